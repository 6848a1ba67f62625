"""The tokenizer of a ``.gguf`` file, rebuilt from the file's metadata.

transformers' reader takes the beginning-of-text token for the end token and loses the
pre-tokenizer's digit splitting (seen with transformers 5.17 and SmolLM2). What is rebuilt here
splits and merges as llama.cpp does with the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer", "collect_end_token_ids", "read_value"]

# llama.cpp's token types (llama.h, enum llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE: Final = "\u2581"

# Where llama.cpp adds a beginning token although the file does not say so: llama_vocab::impl::load
# of llama-vocab.cpp sets add_bos before it looks for tokenizer.ggml.add_bos_token.
_ADDS_BOS_BY_DEFAULT: Final = ("llama-bpe", "llama3", "default")


def read_value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """A metadata value, or ``default`` where the key is absent."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def collect_end_token_ids(reader: GGUFReader) -> list[int]:
    """Every token the file says ends an answer, the end-of-text token first."""
    stated = [
        read_value(reader, f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")
    ]
    return list(dict.fromkeys(int(index) for index in stated if index is not None))


def build_tokenizer(reader: GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer.

    Raises:
        UnsupportedModelError: When it is of a kind that is not rebuilt faithfully.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind, pre = (read_value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and pre in _pre_tokenizers():
        backend = _build_byte_level(reader, pre)
    elif kind == "llama":
        backend = _build_sentencepiece(reader)
    else:
        raise UnsupportedModelError(
            f"{path} has a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}; only 'llama' and "
            f"'gpt2' with one of {', '.join(sorted(_pre_tokenizers()))} are rebuilt faithfully. "
            "Start from the model's safetensors checkpoint."
        )
    tokens: list[str] = read_value(reader, "tokenizer.ggml.tokens")
    types = read_value(reader, "tokenizer.ggml.token_type", [])
    for wanted, is_special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=is_special, normalized=False)
                for token, token_type in zip(tokens, types, strict=False)
                if token_type == wanted
            ]
        )

    def special(role: str) -> str | None:
        index = read_value(reader, f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    bos, eos = special("bos"), special("eos")
    if eos is None:
        raise UnsupportedModelError(f"{path} names no end-of-text token.")
    adds_bos = read_value(reader, "tokenizer.ggml.add_bos_token", pre in _ADDS_BOS_BY_DEFAULT)
    adds_eos = read_value(reader, "tokenizer.ggml.add_eos_token", False)
    _add_ends(backend, tokens, bos if adds_bos else None, eos if adds_eos else None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=special("unknown"),
        pad_token=special("padding"),
        clean_up_tokenization_spaces=False,
        model_max_length=int(
            read_value(reader, f"{read_value(reader, 'general.architecture')}.context_length", 2048)
        ),
    )
    tokenizer.chat_template = read_value(reader, "tokenizer.chat_template")
    if tokenizer.eos_token_id != read_value(reader, "tokenizer.ggml.eos_token_id"):
        raise UnsupportedModelError(
            f"{path}: the rebuilt tokenizer ends with id {tokenizer.eos_token_id}, the file says "
            f"{read_value(reader, 'tokenizer.ggml.eos_token_id')}."
        )
    return tokenizer


def _add_ends(backend: Any, tokens: list[str], bos: str | None, eos: str | None) -> None:
    from tokenizers import processors

    if bos is None and eos is None:
        return
    around = [token for token in (bos, eos) if token is not None]
    # "$A" is the text, ":1" the type id of the second of a pair (tokenizers' TemplateProcessing).
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    second = [f"{part.replace('$A', '$B')}:1" for part in single]
    template = processors.TemplateProcessing(
        single=" ".join(single),
        pair=" ".join([*single, *second]),
        special_tokens=[(token, tokens.index(token)) for token in around],
    )
    backend.post_processor = processors.Sequence([template])


def _build_byte_level(reader: GGUFReader, pre: str) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens: list[str] = read_value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in read_value(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre.startswith("llama"),
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizers()[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(reader: GGUFReader) -> Any:
    """SentencePiece-style BPE: every pair whose union is a token, the best score first."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens: list[str] = read_value(reader, "tokenizer.ggml.tokens")
    scores = read_value(reader, "tokenizer.ggml.scores")
    types = read_value(reader, "tokenizer.ggml.token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # A file of this kind has scores and no merges; tokenizers' BPE has merges and no scores. Every
    # way to cut a token into two tokens becomes a merge, tokens of higher score first, which is
    # the order in which llm_tokenizer_spm_session of llama-vocab.cpp merges the pairs of a text.
    ranked = sorted(
        (index for index, kind in enumerate(types) if kind == _NORMAL and len(tokens[index]) > 1),
        key=lambda index: -scores[index],
    )
    merges = [
        (tokens[index][:cut], tokens[index][cut:])
        for index in ranked
        for cut in range(1, len(tokens[index]))
        if tokens[index][:cut] in vocabulary and tokens[index][cut:] in vocabulary
    ]
    unknown = read_value(reader, "tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    has_prefix = read_value(reader, "tokenizer.ggml.add_space_prefix", True)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = replace
    if has_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    return backend


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
        "dbrx": lambda: split(rf"{words}\p{{N}}{{1,3}}{rest}"),
    }
