"""A Hugging Face tokenizer as llama.cpp's vocabulary.

Everything is read from the tokenizer in memory (what ``tokenizer.json`` says), also when it
was built from a SentencePiece file: byte-level BPE becomes llama.cpp's ``gpt2`` vocabulary,
SentencePiece-style BPE its ``llama`` one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.tokenizer.pre_tokenizers import recognize_pre_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TAKEN_FOR_SPECIAL",
    "Vocabulary",
    "describe_backend",
    "find_special_ids",
    "read_vocabulary",
]

# llama.cpp's token types (llama.h, enum llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: Ordinary tokens that llama.cpp makes control tokens for their text alone, most of them ends
#: of an answer (``llama_vocab::impl::load``). Qwen's vocabulary has ``</s>``, for example.
TAKEN_FOR_SPECIAL: Final = frozenset(
    {
        "</s>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|ifm|im_end|>",
        "<|tool_response>",
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<PRE>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<SUF>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<MID>",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<|file_sep|>",
    }
)

# Texts of control tokens, see _looks_special.
_CONTROL_TEXT: Final = re.compile(
    r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL
)

_SPACE: Final = "\u2581"

# What byte-level BPE must not have, because llama.cpp would ignore it.
_UNSUPPORTED_BPE: Final = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenize.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece-style).
        pre: Name of the pre-tokenizer.
        tokens: Text of every token, by id.
        types: llama.cpp's type of every token.
        scores: For ``"llama"``: merges happen in falling order of score.
        merges: For ``"gpt2"``: pairs, separated by a space, in order.
        special_ids: Ids by role: ``bos``, ``eos``, ``unknown``, ``padding``, ``eot``, ``eom``.
        adds_bos: Whether encoding puts the beginning-of-text token first.
        adds_eos: Whether encoding puts the end-of-text token last.
        adds_space_prefix: Whether a space is put before the text.
        strips_after_special: Whether spaces behind special tokens belong to them, as in phi-3.
        chat_template: The Jinja template, if there is one.
        notes: What the user should know, one sentence each.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space_prefix: bool = False
    strips_after_special: bool = False
    chat_template: str | None = None
    notes: tuple[str, ...] = ()


def describe_backend(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, Any]]:
    """The ``tokenizers.Tokenizer`` inside, and its ``tokenizer.json`` as a dictionary.

    Raises:
        UnsupportedModelError: When the tokenizer has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is written in Python and has no tokenizer.json. Load the "
            "model's fast tokenizer."
        )
    return backend, json.loads(backend.to_str())


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, stop_token_ids: Sequence[int] = ()
) -> Vocabulary:
    """Describe a tokenizer for llama.cpp.

    Args:
        tokenizer: A fast tokenizer.
        size: Rows of the embedding matrix; ids beyond the tokenizer's are padded.
        stop_token_ids: Every token that ends an answer, the tokenizer's own first.

    Raises:
        UnsupportedModelError: When llama.cpp would tokenize differently.
    """
    backend, description = describe_backend(tokenizer)
    model = description["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"The tokenizer is of kind {model.get('type')!r}; GGUF export knows BPE, byte-level "
            "or SentencePiece-style. Export with 'merged_16bit'."
        )
    refused = [key for key in _UNSUPPORTED_BPE if model.get(key)]
    if refused:
        raise UnsupportedModelError(f"llama.cpp's BPE has no {', '.join(refused)}.")
    tokens, types = _list_tokens(backend, description, size)
    special_ids = find_special_ids(tokenizer, stop_token_ids)
    adds_bos, adds_eos = _find_added_ends(tokenizer)
    template = tokenizer.chat_template
    notes: tuple[str, ...] = ()
    if isinstance(template, dict):
        template = template.get("default")
        notes = ("The tokenizer has several chat templates; the default one was written.",)
    merges = [_split_merge(merge) for merge in model["merges"]]
    is_byte_level = _has_byte_level(description.get("pre_tokenizer")) or _has_byte_level(
        description.get("decoder")
    )
    shared: dict[str, Any] = {
        "tokens": tuple(tokens),
        "special_ids": special_ids,
        "adds_bos": adds_bos,
        "adds_eos": adds_eos,
        "strips_after_special": any(
            added.get("rstrip") for added in description.get("added_tokens", ())
        ),
        "chat_template": template,
        "notes": notes,
    }
    if is_byte_level:
        known = recognize_pre_tokenizer(backend, description)
        pairs = tuple(f"{left} {right}" for left, right in merges)
        return Vocabulary("gpt2", known.name, types=tuple(types), merges=pairs, **shared)
    _check_byte_fallback(model, tokens)
    types = _mark_bytes(tokens, types)
    unknown = special_ids.get("unknown")
    if unknown is not None and types[unknown] == CONTROL:
        types[unknown] = UNKNOWN
    return Vocabulary(
        "llama",
        "default",
        types=tuple(types),
        scores=tuple(_score_by_merge_rank(tokens, merges)),
        adds_space_prefix=_adds_space_prefix(backend),
        **shared,
    )


def _list_tokens(
    backend: Any, description: Mapping[str, Any], size: int
) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= size:
        raise UnsupportedModelError(
            f"The tokenizer has {max(by_id) + 1} ids and the model {size} embeddings. Resize the "
            "model's embeddings, or use the tokenizer that belongs to it."
        )
    known = set(by_id.values())
    tokens, types = [], []
    for index in range(size):
        if index in by_id:
            tokens.append(by_id[index])
            types.append(NORMAL)
            continue
        name = f"[PAD{index}]"
        while name in known:
            name = f"[{name}]"
        tokens.append(name)
        types.append(UNUSED)
    for added in description.get("added_tokens", ()):
        is_control = added["special"] or _looks_special(added["content"])
        types[added["id"]] = CONTROL if is_control else USER_DEFINED
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether an added token is a control token although the tokenizer does not call it one.

    Qwen's tokens for filling in the middle and Gemma's reserved ones are such; llama.cpp's
    converter (``does_token_look_special``) goes by their text, and so does its runtime.
    """
    return _CONTROL_TEXT.fullmatch(token) is not None


def find_special_ids(
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> dict[str, int]:
    """Ids by role, as in :attr:`Vocabulary.special_ids`.

    Raises:
        UnsupportedModelError: When the tokenizer names no end token.
    """
    roles = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    ids = {role: int(index) for role, index in roles.items() if index is not None}
    if "eos" not in ids:
        raise UnsupportedModelError(
            "The tokenizer names no end-of-text token, so llama.cpp would never stop. Set "
            "tokenizer.eos_token."
        )
    others = [index for index in stop_token_ids if index != ids["eos"]]
    # llama_vocab::impl::load reads two further stop tokens besides eos, and recognizes the usual
    # ones by their text, see TAKEN_FOR_SPECIAL.
    ids.update(zip(("eot", "eom"), others, strict=False))
    return ids


def _find_added_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    start = len(full) - len(plain)
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        wanted = [
            *([tokenizer.bos_token_id] if adds_bos else []),
            *plain,
            *([tokenizer.eos_token_id] if adds_eos else []),
        ]
        if wanted == list(full):
            return adds_bos, adds_eos
    raise UnsupportedModelError(
        f"The tokenizer adds {start} tokens around a text that are not its beginning and end "
        f"tokens: {full}. llama.cpp can add those two only."
    )


def _split_merge(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _has_byte_level(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    inner = [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return part.get("type") == "ByteLevel" or any(_has_byte_level(item) for item in inner)


def _check_byte_fallback(model: Mapping[str, Any], tokens: Sequence[str]) -> None:
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if not model.get("byte_fallback") or missing:
        raise UnsupportedModelError(
            "The tokenizer is neither byte-level nor has tokens for all bytes, so llama.cpp could "
            "not encode every text. Export with 'merged_16bit'."
        )


def _mark_bytes(tokens: Sequence[str], types: list[int]) -> list[int]:
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    return [BYTE if token in names else kind for token, kind in zip(tokens, types, strict=True)]


def _score_by_merge_rank(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores whose falling order is the order of merges.

    llama.cpp merges the neighbours whose union scores highest; with the negative rank of the
    first merge that makes a token, that is the order BPE merges in.
    """
    # Tokens that no merge makes (single characters, added tokens) come last. llama.cpp asks for a
    # score only of unions that are tokens, so theirs decides nothing.
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(merges):
        rank.setdefault(left + right, position)
    last = len(merges) + 1
    return [-float(rank.get(token, last)) for token in tokens]


def _adds_space_prefix(backend: Any) -> bool:
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    if text not in ("a", f"{_SPACE}a"):
        raise UnsupportedModelError(
            f"The tokenizer turns 'a' into {text!r} before encoding; llama.cpp can only put a "
            "space before it."
        )
    return text != "a"
