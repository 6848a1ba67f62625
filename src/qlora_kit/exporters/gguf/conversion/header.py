"""The head of a ``.gguf`` file: metadata, vocabulary and the list of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.exporters.gguf.conversion.file_plan import Plan, count_tensor_bytes
from qlora_kit.exporters.gguf.conversion.origin import Origin, describe_size, write_origin
from qlora_kit.exporters.gguf.quantization.ggml import type_number
from qlora_kit.exporters.gguf.quantization.importance import ImportanceMatrix
from qlora_kit.exporters.gguf.quantization.recipes import Recipe, find_file_type
from qlora_kit.exporters.gguf.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["write_header"]


def write_header(
    path: Path,
    plan: Plan,
    recipe: Recipe,
    vocabulary: Vocabulary,
    model_name: str,
    origin: Origin,
    *,
    importance: ImportanceMatrix | None = None,
    part: int = 0,
) -> None:
    """Write everything before the tensors' data; the file ends where alignment begins.

    Args:
        path: Where to.
        plan: What will be written.
        recipe: The quantization of this file.
        vocabulary: Its vocabulary.
        model_name: ``general.name``.
        origin: Where the model comes from.
        importance: What guides the quantizer.
        part: Which of the recipe's files this is; the first one carries the metadata.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    parts = plan.parts(recipe)
    writer = GGUFWriter(path, plan.family.architecture)
    if part == 0:
        _add_metadata(writer, plan, recipe, model_name, origin)
        if importance is not None:
            _add_importance(writer, importance)
        _add_vocabulary(writer, vocabulary)
    if len(parts) > 1:
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", len(parts))
        writer.add_int32("split.tensors.count", len(plan.tensors))
    types = plan.types[recipe.name]
    for tensor in parts[part].tensors:
        # The writer turns shapes round: the file counts columns first, (columns, rows, experts).
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            count_tensor_bytes(tensor.shape, types[tensor.name]),
            raw_dtype=GGMLQuantizationType(type_number(types[tensor.name])),
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_metadata(
    writer: GGUFWriter, plan: Plan, recipe: Recipe, model_name: str, origin: Origin
) -> None:
    from gguf import GGML_QUANT_VERSION

    writer.add_type("model")
    writer.add_name(model_name)
    writer.add_size_label(describe_size([(t.name, t.shape) for t in plan.tensors]))
    write_origin(writer, origin)
    types = plan.types[recipe.name].values()
    writer.add_file_type(find_file_type(types) if recipe.target else recipe.file_type)
    # GGML_QNT_VERSION of ggml.h: the layout of the blocks. Written always, as the converter does.
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in plan.description.metadata.items():
        _add_value(writer, f"{plan.family.architecture}.{key}", value)
    for key, value in plan.description.plain.items():
        _add_value(writer, key, value)
    writer.add_vocab_size(plan.vocabulary_size)


def _add_importance(writer: GGUFWriter, importance: ImportanceMatrix) -> None:
    """What ``llama-quantize`` says of the matrix it was given."""
    if importance.path is not None:
        writer.add_string("quantize.imatrix.file", importance.path.name)
    if importance.datasets:
        writer.add_string("quantize.imatrix.dataset", importance.datasets[0])
    writer.add_uint32("quantize.imatrix.entries_count", len(importance.entries))
    if importance.chunk_count > 0:
        writer.add_uint32("quantize.imatrix.chunks_count", importance.chunk_count)


def _add_value(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for role, index in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
