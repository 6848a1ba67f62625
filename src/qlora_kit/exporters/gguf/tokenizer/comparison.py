"""The exported vocabulary held against the Hugging Face tokenizer before a weight is written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.tokenizer.llama_tokenizer import LlamaTokenizer
from qlora_kit.exporters.gguf.tokenizer.pre_tokenizers import find_approximated
from qlora_kit.exporters.gguf.tokenizer.probe_texts import list_probe_texts, mix_with_tokens
from qlora_kit.exporters.gguf.tokenizer.vocabulary import (
    CONTROL,
    NORMAL,
    TAKEN_FOR_SPECIAL,
    Vocabulary,
    describe_backend,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_vocabulary", "check_written_name", "compare_tokenizers", "is_called_like_phi3"]

# llama.cpp strips the spaces behind special tokens of a model called so (llama-vocab.cpp).
_STRIPPING_NAMES: Final = ("phi-3", "phi3")

_MIXED_TOKENS: Final = 8


def check_vocabulary(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, tuple[str, ...]]:
    """Encode the probe texts both ways.

    Returns:
        How many texts were compared, and notes about texts that had to be left out.

    Raises:
        UnsupportedModelError: When any is encoded or decoded differently; shows the first.
    """
    texts, notes = _choose_texts(vocabulary, tokenizer)
    different = compare_tokenizers(vocabulary, tokenizer, texts)
    if different:
        text, wanted, got = different[0]
        raise UnsupportedModelError(
            f"llama.cpp would tokenize {len(different)} of {len(texts)} test texts differently "
            f"than this tokenizer, for example {text!r}: {got} instead of {wanted}. Export with "
            "'merged_16bit' instead, or restore the model's own tokenizer.json."
        )
    return len(texts), notes


def compare_tokenizers(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[tuple[str, list[int], list[int]]]:
    """Texts that are encoded differently: the text, what is right, and what llama.cpp gives."""
    backend, _ = describe_backend(tokenizer)
    written = LlamaTokenizer(vocabulary)
    different = []
    for text in texts:
        wanted = backend.encode(text, add_special_tokens=False).ids
        got = written.encode(text)
        if got != wanted or not _decodes_to(written, wanted, text, vocabulary):
            different.append((text, wanted, got))
    return different


def _decodes_to(written: LlamaTokenizer, ids: list[int], text: str, vocabulary: Vocabulary) -> bool:
    if vocabulary.strips_after_special:
        return True
    decoded = written.decode(ids)
    if vocabulary.model == "gpt2":
        return decoded == text.encode()
    # SentencePiece-style: a space was put before the text, and before what follows a special
    # token; it also cannot tell a space from its own mark for one.
    marked = decoded.replace("\u2581".encode(), b" ").replace(b" ", b"")
    return marked == text.replace("\u2581", " ").replace(" ", "").encode()


def _choose_texts(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], tuple[str, ...]]:
    backend, description = describe_backend(tokenizer)
    notes = []
    texts = list_probe_texts()
    if _normalizes_unicode(description.get("normalizer")):
        kept = [text for text in texts if backend.normalizer.normalize_str(text) == text]
        notes.append(
            "The tokenizer normalizes Unicode and llama.cpp does not: text that is not in "
            "normalized form is tokenized differently."
        )
        texts = kept
    if vocabulary.model == "gpt2":
        texts, approximated = find_approximated(backend, vocabulary.pre, texts)
        if approximated:
            count = f"{len(approximated)} of {len(texts) + len(approximated)} test texts"
            notes.append(
                f"llama.cpp's pre-tokenizer {vocabulary.pre!r} approximates this tokenizer's: "
                "words with combining marks, and capitals inside of words beyond ASCII, can be "
                f"split differently ({count})."
            )
    taken = [
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == NORMAL and token in TAKEN_FOR_SPECIAL
    ]
    if taken:
        notes.append(
            f"llama.cpp takes the ordinary token {' and '.join(map(repr, taken))} for a special "
            "one by its name: it can end an answer, and text that contains it is tokenized "
            "differently."
        )
        texts = [text for text in texts if not any(token in text for token in taken)]
    control = [
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == CONTROL
    ]
    # The tokens of a chat template are what matters; hundreds of reserved ones do not.
    used = [token for token in control if token in (vocabulary.chat_template or "")]
    ends = [vocabulary.tokens[index] for index in vocabulary.special_ids.values()]
    chosen = list(dict.fromkeys([*ends, *used, *control]))[:_MIXED_TOKENS]
    chosen = [token for token in chosen if token]
    if _is_metaspace(description) and vocabulary.adds_space_prefix:
        notes.append(
            "The tokenizer puts a space before the first word only, and only if there is none; "
            "llama.cpp always puts one, and one after every special token. Prompts that begin "
            "with a space, or go on after a special token, differ by that space."
        )
        texts = [
            text
            for text in texts
            if not text.startswith((" ", "\u2581")) and not any(token in text for token in control)
        ]
        texts += [*chosen, *(token + other for token in chosen for other in chosen)]
    else:
        texts = texts + mix_with_tokens(chosen)
    return texts, tuple(notes)


def _normalizes_unicode(normalizer: Any) -> bool:
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "Sequence":
        return any(_normalizes_unicode(part) for part in normalizer["normalizers"])
    return normalizer.get("type") in ("NFC", "NFD", "NFKC", "NFKD")


def _is_metaspace(description: dict[str, Any]) -> bool:
    stated = description.get("pre_tokenizer")
    return isinstance(stated, dict) and stated.get("type") == "Metaspace"


def is_called_like_phi3(name: str) -> bool:
    """Whether llama.cpp takes a model for a phi-3, whose special tokens swallow spaces."""
    return any(part in name.lower() for part in _STRIPPING_NAMES)


def check_written_name(name: str, vocabulary: Vocabulary) -> str:
    """The name to write into the file, given what llama.cpp reads into names.

    A model called "phi-3" has the spaces behind its special tokens stripped, whatever its
    tokenizer says; other names never have.

    Returns:
        ``name``, changed where it would switch that on wrongly or fail to.
    """
    if vocabulary.strips_after_special == is_called_like_phi3(name):
        return name
    if vocabulary.strips_after_special:
        return f"{name} (phi-3 tokenizer)"
    return re.sub(r"phi-?3", "Phi 3", name, flags=re.IGNORECASE)
