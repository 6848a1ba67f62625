"""Which of llama.cpp's pre-tokenizers splits text as a given tokenizer does.

llama.cpp names its pre-tokenizers and hard-codes their patterns (``src/llama-vocab.cpp``); a
file only carries the name. A name is found here by the structure of ``tokenizer.json``, and is
accepted only when the splits agree on every probe text: two tokenizers can share a name or a
hash and differ in one rule, such as splitting digits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qlora_kit.errors import PluginError, UnsupportedModelError
from qlora_kit.exporters.gguf.tokenizer.probe_texts import list_probe_texts

__all__ = [
    "PRE_TOKENIZERS",
    "PreTokenizer",
    "find_approximated",
    "recognize_pre_tokenizer",
    "register_pre_tokenizer",
    "split_text",
]

logger = logging.getLogger(__name__)

_CONTRACTIONS: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35: Final = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    + r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER: Final = r"((?=[\p{L}])([^a-z]))"
_LOWER: Final = r"((?=[\p{L}])([^A-Z]))"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What tokenizers of these two say; llama.cpp's patterns above come near it.
_CAPITAL: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_STATED: Final = _TEKKEN.replace(_UPPER, _CAPITAL).replace(_LOWER, _SMALL)
_GPT4O_STATED: Final = _GPT4O.replace(_UPPER, _CAPITAL).replace(_LOWER, _SMALL)

#: A digit alone, cut out before the other pattern sees the text.
_DIGIT: Final = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers for byte-level BPE.

    Attributes:
        name: What ``tokenizer.ggml.pre`` says.
        patterns: Regular expressions, each applied to the pieces the one before left.
        ignores_merges: Whether a piece that is a token is taken whole, without merging.
        approximates: The patterns of tokenizers that llama.cpp runs with this one although some
            text is split differently. Such a text is said, not refused.
    """

    name: str
    patterns: tuple[str, ...]
    ignores_merges: bool = False
    approximates: tuple[str, ...] = ()


#: By name. Names with equal patterns differ in whether merges are ignored.
PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    known.name: known
    for known in (
        PreTokenizer("gpt-2", (_GPT2,)),
        PreTokenizer("smollm", (_DIGIT, _GPT2)),
        PreTokenizer("qwen2", (_QWEN2,)),
        PreTokenizer("qwen35", (_QWEN35,)),
        PreTokenizer("llama-bpe", (_LLAMA3,), ignores_merges=True),
        PreTokenizer("dbrx", (_LLAMA3,)),
        PreTokenizer("tekken", (_TEKKEN,), ignores_merges=True, approximates=(_TEKKEN_STATED,)),
        PreTokenizer("gpt-4o", (_GPT4O,), approximates=(_GPT4O_STATED,)),
    )
}

# How tokenizer.json files spell the same patterns.
_SPELLINGS: Final[Mapping[str, str]] = {
    spelling.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTIONS): pattern
    for spelling, pattern in (
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _LLAMA3.removeprefix(_CONTRACTIONS), _LLAMA3),
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _QWEN2.removeprefix(_CONTRACTIONS), _QWEN2),
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _QWEN35.removeprefix(_CONTRACTIONS), _QWEN35),
        (_GPT2 + r"|\s+", _GPT2),
        (_GPT2, _GPT2),
    )
}


def register_pre_tokenizer(known: PreTokenizer) -> None:
    """Add one of llama.cpp's pre-tokenizers to the table.

    Args:
        known: Its name in ``llama-vocab.cpp`` and the patterns it has there. Registering the
            same one twice changes nothing.

    Raises:
        PluginError: When another one of that name is there already.
    """
    if PRE_TOKENIZERS.setdefault(known.name, known) != known:
        raise PluginError(f"A pre-tokenizer named {known.name!r} exists already.")


def split_text(text: str, patterns: Sequence[str]) -> list[str]:
    """Split as llama.cpp does: matches are pieces, and so is whatever lies between them."""
    pieces = [text] if text else []
    for pattern in patterns:
        expression = _compile(pattern)
        pieces = [part for piece in pieces for part in _split_piece(piece, expression)]
    return pieces


@functools.cache
def _compile(pattern: str) -> Any:
    import regex  # type: ignore[import-untyped]

    return regex.compile(pattern)


def _split_piece(piece: str, expression: Any) -> list[str]:
    # unicode_regex_split (unicode.cpp). Empty matches make no piece; a gap before a match is one.
    parts, end = [], 0
    for match in expression.finditer(piece):
        if match.start() > end:
            parts.append(piece[end : match.start()])
        if match.end() > match.start():
            parts.append(match.group())
            end = match.end()
    if end < len(piece):
        parts.append(piece[end:])
    return parts


def recognize_pre_tokenizer(backend: Any, description: Mapping[str, Any]) -> PreTokenizer:
    """The pre-tokenizer of llama.cpp that a byte-level BPE tokenizer corresponds to.

    Args:
        backend: A ``tokenizers.Tokenizer``.
        description: The same as ``tokenizer.json`` describes it.

    Raises:
        UnsupportedModelError: When none splits as it does.
    """
    ignores_merges = bool(description["model"].get("ignore_merges"))
    stated = _read_patterns(description.get("pre_tokenizer"))
    candidates = sorted(
        PRE_TOKENIZERS.values(),
        key=lambda known: (known.patterns != stated, known.ignores_merges != ignores_merges),
    )
    texts = _comparable_texts(backend)
    wanted = [_split_with_backend(backend, text) for text in texts]
    nearest, fewest = "", len(texts) + 1
    for known in candidates:
        different = [
            text
            for text, pieces in zip(texts, wanted, strict=True)
            if split_text(text, known.patterns) != pieces
        ]
        if not different:
            if known.patterns != stated:
                logger.info("The pre-tokenizer is llama.cpp's %r by its splits.", known.name)
            return known
        if len(different) < fewest:
            fewest, nearest = len(different), f"{known.name!r} on {different[0]!r}"
    for known in candidates:
        if known.approximates == stated and known.ignores_merges == ignores_merges:
            return known
    raise UnsupportedModelError(
        "llama.cpp has no pre-tokenizer that splits text as this tokenizer does; the nearest "
        f"differs on {fewest} of {len(texts)} texts ({nearest}). If the tokenizer was edited, "
        "restore its tokenizer.json; otherwise export with 'merged_16bit'. Its pre_tokenizer is "
        f"{description.get('pre_tokenizer')}."
    )


def find_approximated(backend: Any, pre: str, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts that a tokenizer splits as ``pre`` does, and those that it splits differently.

    The second list is empty unless llama.cpp is known to approximate the tokenizer.
    """
    known = PRE_TOKENIZERS[pre]
    if not known.approximates:
        return list(texts), []
    differ = {
        text
        for text in texts
        if split_text(text, known.patterns) != _split_with_backend(backend, text)
    }
    return [text for text in texts if text not in differ], sorted(differ)


def _read_patterns(stated: Any) -> tuple[str, ...]:
    """The patterns that a ``pre_tokenizer`` entry amounts to, or nothing when it is unknown."""
    if not isinstance(stated, Mapping):
        return ()
    match stated.get("type"):
        case "Sequence":
            parts = [_read_patterns(part) for part in stated.get("pretokenizers", ())]
            # A ByteLevel that does not split contributes no pattern and is no obstacle.
            return tuple(pattern for part in parts for pattern in part)
        case "ByteLevel":
            return (_GPT2,) if stated.get("use_regex", True) else ()
        case "Digits" if stated.get("individual_digits"):
            return (_DIGIT,)
        case "Split" if stated.get("behavior") == "Isolated" and not stated.get("invert"):
            pattern = (stated.get("pattern") or {}).get("Regex", "")
            spelled = pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTIONS)
            return (_SPELLINGS.get(spelled, spelled),)
    return ("unknown",)


def _comparable_texts(backend: Any) -> list[str]:
    """Texts that the tokenizer's normalizer leaves alone, which llama.cpp has not got."""
    texts = [text for text in list_probe_texts() if text]
    if backend.normalizer is None:
        return texts
    return [text for text in texts if backend.normalizer.normalize_str(text) == text]


def _split_with_backend(backend: Any, text: str) -> list[str]:
    """The tokenizer's own pieces, cut from the text by their offsets."""
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]
