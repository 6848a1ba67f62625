"""A ``.gguf`` file as a base model: dequantized once into a cached checkpoint.

transformers reads the weights. The tokenizer is rebuilt here from the file's own
metadata, because transformers' reader takes the beginning-of-text token for the end
token and loses the pre-tokenizer's digit splitting (seen with transformers 5.17 and
SmolLM2). Architectures that transformers reads wrongly are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import MissingDependencyError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

__all__ = ["dequantize_gguf"]

logger = logging.getLogger(__name__)

#: Part of the cache key; raised when the files written here change.
_CACHE_VERSION: Final = 1

#: Architectures whose logits were compared with llama.cpp's.
_READ_CORRECTLY: Final = ("llama", "qwen2", "qwen3")

_SAMPLE_BYTES: Final = 4 * 1024 * 1024

# llama.cpp's token types (llama.h, enum llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4


def dequantize_gguf(path: Path, cache_dir: Path) -> Path:
    """The checkpoint folder for a GGUF file, written on first use.

    Args:
        path: A ``.gguf`` file.
        cache_dir: Where dequantized checkpoints are kept, one folder per file content.

    Returns:
        A folder with bfloat16 safetensors, config, generation config, tokenizer and chat
        template.

    Raises:
        MissingDependencyError: When the ``gguf`` package is not installed.
        UnsupportedModelError: When the file is damaged, or transformers would read it wrongly.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {path} needs the gguf package: pip install 'qlora-kit[gguf]'."
        ) from error
    folder = cache_dir / f"{path.stem}-{_fingerprint(path)}"
    if (folder / "config.json").is_file():
        logger.info("Using the dequantized checkpoint %s", folder)
        return folder
    reader = _open(path)
    _check_architecture(reader, path)
    tokenizer = _build_tokenizer(reader, path)
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that a second process never sees half a checkpoint.
    staging = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=cache_dir))
    try:
        _write_checkpoint(path, reader, tokenizer, staging)
        os.replace(staging, folder)
    except OSError:
        # Another process may have finished the same folder first.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("Dequantized %s into %s", path, folder)
    return folder


def _fingerprint(path: Path) -> str:
    """A hash of the file's size, head and tail: whole-file hashing would cost minutes at 70B."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{_CACHE_VERSION}:{size}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelNotFoundError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
    try:
        return GGUFReader(path)
    # The reader indexes a memory map; a truncated file surfaces as any of these.
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UnsupportedModelError(f"{path} is damaged or truncated: {error}") from error


def _read(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _check_architecture(reader: GGUFReader, path: Path) -> None:
    architecture = _read(reader, "general.architecture")
    if architecture not in _READ_CORRECTLY:
        raise UnsupportedModelError(
            f"{path} holds a {architecture!r} model, which transformers does not read correctly "
            f"from GGUF (checked: {', '.join(_READ_CORRECTLY)}). Start from the model's "
            "safetensors checkpoint."
        )
    tensors = {tensor.name for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors or _read(reader, f"{architecture}.rope.scaling.type"):
        raise UnsupportedModelError(
            f"{path} uses scaled rotary embeddings, which transformers drops when reading GGUF. "
            "Start from the model's safetensors checkpoint."
        )
    heads = _read(reader, f"{architecture}.attention.head_count")
    width = _read(reader, f"{architecture}.embedding_length")
    key_length = _read(reader, f"{architecture}.attention.key_length")
    if key_length is not None and heads and key_length * heads != width and architecture != "qwen3":
        raise UnsupportedModelError(
            f"{path} has heads of {key_length} where {width}/{heads} is expected; transformers "
            "ignores that when reading GGUF. Start from the model's safetensors checkpoint."
        )


def _write_checkpoint(
    path: Path, reader: GGUFReader, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    architecture = _read(reader, "general.architecture")
    key_length = _read(reader, f"{architecture}.attention.key_length")
    if key_length is not None:
        config.head_dim = int(key_length)
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        config=config,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    # The name inside the file would be taken for a hub id.
    config_path = folder / "config.json"
    saved = json.loads(config_path.read_text(encoding="utf-8"))
    saved.pop("_model_name_or_path", None)
    config_path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _pre_tokenizers() -> dict[str, Callable[[], Any]]:
    """Pre-tokenizers by ``tokenizer.ggml.pre``, as llama.cpp's ``llama-vocab.cpp`` splits."""
    from tokenizers import Regex, pre_tokenizers

    def byte_level() -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def digits_then_bytes() -> Any:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level()]
        )

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return {
        "smollm": digits_then_bytes,
        "gpt-2": byte_level,
        "qwen2": lambda: split(rf"{words}\p{{N}}{rest}"),
        "llama-bpe": lambda: split(rf"{words}\p{{N}}{{1,3}}{rest}"),
        "llama3": lambda: split(rf"{words}\p{{N}}{{1,3}}{rest}"),
    }


def _build_tokenizer(reader: GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    """The file's byte-level BPE tokenizer, from its own metadata alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    kind, pre = _read(reader, "tokenizer.ggml.model"), _read(reader, "tokenizer.ggml.pre")
    known = _pre_tokenizers()
    if kind != "gpt2" or pre not in known:
        raise UnsupportedModelError(
            f"{path} has a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}; only 'gpt2' "
            f"(byte-level BPE) with one of {', '.join(sorted(known))} is rebuilt faithfully. "
            "Start from the model's safetensors checkpoint."
        )
    tokens: list[str] = _read(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _read(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.startswith("llama")))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = known[pre]()
    backend.decoder = decoders.ByteLevel()
    types = _read(reader, "tokenizer.ggml.token_type", [])
    for wanted, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=is_special, normalized=False)
                for token, token_type in zip(tokens, types, strict=False)
                if token_type == wanted
            ]
        )

    def special(role: str) -> str | None:
        index = _read(reader, f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    bos, eos = special("bos"), special("eos")
    if eos is None:
        raise UnsupportedModelError(f"{path} names no end-of-text token.")
    if bos is not None and _read(reader, "tokenizer.ggml.add_bos_token", False):
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos}:1 $B:1",
                    special_tokens=[(bos, vocabulary[bos])],
                ),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=special("unknown"),
        pad_token=special("padding"),
        clean_up_tokenization_spaces=False,
        model_max_length=int(
            _read(reader, f"{_read(reader, 'general.architecture')}.context_length", 2048)
        ),
    )
    tokenizer.chat_template = _read(reader, "tokenizer.chat_template")
    if tokenizer.eos_token_id != _read(reader, "tokenizer.ggml.eos_token_id"):
        raise UnsupportedModelError(
            f"{path}: the rebuilt tokenizer ends with id {tokenizer.eos_token_id}, the file says "
            f"{_read(reader, 'tokenizer.ggml.eos_token_id')}."
        )
    return tokenizer
