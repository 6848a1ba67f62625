"""A ``.gguf`` file as a base model: dequantized once into a cached checkpoint.

transformers' names and order of tensors are taken over; models that it reads wrongly are refused.
The tokenizer is rebuilt from the file's own metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause, translate_errors
from qlora_kit.engines.gguf.completeness import check_keys, check_tensors, make_processor
from qlora_kit.engines.gguf.file_tokenizer import (
    build_tokenizer,
    collect_end_token_ids,
    read_value,
)
from qlora_kit.engines.gguf.split_files import find_parts, join_parts
from qlora_kit.errors import (
    ConfigError,
    MissingDependencyError,
    ModelNotFoundError,
    QloraKitError,
    UnsupportedModelError,
)
from qlora_kit.file_locks import holding_lock
from qlora_kit.launches import once_a_machine, stamp_paths
from qlora_kit.messages import Setting
from qlora_kit.paths import CACHE_VARIABLE
from qlora_kit.private_folders import locked_folder, remove_abandoned

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

__all__ = ["dequantize_gguf"]

logger = logging.getLogger(__name__)

#: Part of the cache key; raised when the files written here change.
_CACHE_VERSION: Final = 3

#: Characters of the file's name that names in the cache have.
_STEM: Final = 48

#: Architectures whose logits were compared with llama.cpp's (transformers 5.17). It drops
#: gemma's norms and windows, and qwen3moe's experts do not load.
_READ_CORRECTLY: Final = ("llama", "phi3", "qwen2", "qwen3")

#: Biases that transformers' models of these architectures have without being told.
_READ_BIASES: Final = {"qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias")}


def dequantize_gguf(path: Path, cache_dir: Path) -> Path:
    """The checkpoint folder for a GGUF file, written on first use.

    Args:
        path: A ``.gguf`` file, or any part of a model in several.
        cache_dir: Where dequantized checkpoints are kept, one folder per file content.

    Returns:
        A folder with bfloat16 safetensors, config, generation config, tokenizer and chat
        template.

    Raises:
        MissingDependencyError: When the ``gguf`` package is not installed.
        ModelNotFoundError: When a part of the model is missing.
        UnsupportedModelError: When the file is damaged or incomplete, or transformers would read
            it wrongly.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {path} needs the gguf package: pip install 'qlora-kit[gguf]'."
        ) from error
    reader = _open(path)
    parts = find_parts(path, reader)
    # Every process of a machine wants it at the same time: one reads, the others find.
    print_of = once_a_machine("reading a file", stamp_paths(parts), lambda: _fingerprint(parts))
    folder = cache_dir / f"{path.stem[:_STEM]}-{print_of}"
    remove_abandoned(cache_dir)
    with holding_lock(cache_dir / f"{folder.name}.lock", f"dequantizing {path}"):
        return _find_or_make(path, parts, reader, folder)


def _find_or_make(path: Path, parts: Sequence[Path], reader: GGUFReader, folder: Path) -> Path:
    cache_dir = folder.parent
    if (folder / "config.json").is_file():
        logger.info("Using the dequantized checkpoint %s", folder)
        return folder
    # Written aside and renamed, so that a second process never sees half a checkpoint.
    with (
        translate_errors(lambda error: _explain_writing(error, path, cache_dir)),
        _staging(cache_dir, path) as staging,
    ):
        whole = path
        if len(parts) > 1:
            logger.info("Joining the %d parts of %s.", len(parts), path)
            whole = staging / "joined.gguf"
            join_parts(parts, [_open(part) for part in parts], whole)
            reader = _open(whole)
        _check_architecture(reader, path)
        check_keys(reader, path)
        tokenizer = build_tokenizer(reader, path)
        checkpoint = staging / "checkpoint"
        checkpoint.mkdir()
        _write_checkpoint(path, whole, reader, tokenizer, checkpoint)
        # Another process may have finished the same folder first.
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(checkpoint, folder)
    logger.info("Dequantized %s into %s", path, folder)
    return folder


@contextlib.contextmanager
def _staging(cache_dir: Path, path: Path) -> Iterator[Path]:
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked_folder(cache_dir, path.stem[:_STEM]) as folder:
        yield folder


def _explain_writing(error: Exception, path: Path, cache_dir: Path) -> QloraKitError:
    text = describe_cause(error)
    # safetensors writes through Rust, whose error has no number.
    if isinstance(error, OSError) or "os error" in text or "PytorchStreamWriter" in text:
        return ConfigError(
            f"{path} cannot be dequantized into the cache {cache_dir}: {text} Free some of that "
            f"disk, or keep the cache elsewhere: set {CACHE_VARIABLE}, or give ",
            Setting("cache_dir", ..., "load_quantized"),
            ".",
            parameter="cache_dir",
            value=str(cache_dir),
        )
    return UnsupportedModelError(f"{path} cannot be read: {text} Get another file.")


def _fingerprint(parts: Sequence[Path]) -> str:
    """A hash of all of it: models trained again differ in the middle, with the same size."""
    digest = hashlib.sha256(f"{_CACHE_VERSION}:".encode())
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _open(path: Path) -> GGUFReader:
    import numpy as np
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            begins = file.read(4)
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {describe_cause(error)}") from error
    if begins != b"GGUF":
        raise ModelNotFoundError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")

    class Reader(GGUFReader):
        """Slices plain memory: of a memory map each slice, one per token, is a map again."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    try:
        return Reader(path)
    # The reader indexes a memory map; a truncated file surfaces as any of these.
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UnsupportedModelError(f"{path} is damaged or truncated: {error}") from error


def _check_architecture(reader: GGUFReader, path: Path) -> None:
    architecture = read_value(reader, "general.architecture")
    if architecture not in _READ_CORRECTLY:
        raise UnsupportedModelError(
            f"{path} holds a {architecture!r} model, which transformers does not read correctly "
            f"from GGUF (checked: {', '.join(_READ_CORRECTLY)}). Start from the model's "
            "safetensors checkpoint."
        )
    if architecture == "llama" and read_value(reader, "llama.expert_count", 0):
        raise UnsupportedModelError(
            f"{path} holds a model with experts (Mixtral), which transformers reads as a plain "
            "Llama from GGUF. Start from the model's safetensors checkpoint."
        )
    tensors = {tensor.name for tensor in reader.tensors}
    scaled = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    if scaled & tensors or read_value(reader, f"{architecture}.rope.scaling.type"):
        raise UnsupportedModelError(
            f"{path} uses scaled rotary embeddings, which transformers drops when reading GGUF. "
            "Start from the model's safetensors checkpoint."
        )
    expected = _READ_BIASES.get(architecture, ())
    biases = sorted(
        name for name in tensors if name.endswith(".bias") and not name.endswith(expected)
    )
    if biases:
        raise UnsupportedModelError(
            f"{path} has biases such as {biases[0]!r}, which transformers drops when reading "
            "GGUF. Start from the model's safetensors checkpoint."
        )
    heads = read_value(reader, f"{architecture}.attention.head_count")
    width = read_value(reader, f"{architecture}.embedding_length")
    key_length = read_value(reader, f"{architecture}.attention.key_length")
    rotary = read_value(reader, f"{architecture}.rope.dimension_count")
    if architecture == "phi3" and rotary and heads and rotary * heads != width:
        raise UnsupportedModelError(
            f"{path} rotates {rotary} of {width // heads} dimensions per head, which transformers "
            "ignores when reading GGUF. Start from the model's safetensors checkpoint."
        )
    if key_length is not None and heads and key_length * heads != width and architecture != "qwen3":
        raise UnsupportedModelError(
            f"{path} has heads of {key_length} where {width}/{heads} is expected; transformers "
            "ignores that when reading GGUF. Start from the model's safetensors checkpoint."
        )


def _write_checkpoint(
    path: Path,
    whole: Path,
    reader: GGUFReader,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers' processors undo the permutation of q and k in llama files that
    # exporters/gguf/families makes. What transformers drops was refused before; what it misreads
    # is set below. Its own way of reading the weights gives the same and takes four times as long.
    config = AutoConfig.from_pretrained(str(whole.parent), gguf_file=whole.name)
    architecture = read_value(reader, "general.architecture")
    key_length = read_value(reader, f"{architecture}.attention.key_length")
    if key_length is not None:
        config.head_dim = int(key_length)
    names = check_tensors(reader, config, path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = collect_end_token_ids(reader)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, state_dict=_dequantize_tensors(reader, config, names))
    # The name inside the file would be taken for a hub id.
    config_path = folder / "config.json"
    saved = json.loads(config_path.read_text(encoding="utf-8"))
    saved.pop("_model_name_or_path", None)
    config_path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _dequantize_tensors(
    reader: GGUFReader, config: Any, names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """All of a file's tensors in bfloat16, by transformers' names."""
    import torch
    from gguf import dequantize

    processor = make_processor(reader, config)

    def read(tensor: Any) -> tuple[str, torch.Tensor]:
        weights = dequantize(tensor.data, tensor.tensor_type)
        found = processor.process(weights=weights, name=tensor.name)
        return names[found.name], torch.tensor(found.weights, dtype=torch.bfloat16)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy lets others run meanwhile
        return dict(pool.map(read, reader.tensors))
