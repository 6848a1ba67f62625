"""A loaded tokenizer held against its own file, which is the authority on what text becomes.

transformers 5.17 chooses a class by ``tokenizer_class`` or the model's type, and some classes
replace parts of ``tokenizer.json`` by their own: pre-tokenizer, prefix space, decoder. A model
trained on such ids is trained on other tokens than its makers'.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qlora_kit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["find_differing_text", "match_with_file"]

logger = logging.getLogger(__name__)

_JSON: Final = "tokenizer.json"
_SENTENCEPIECE: Final = "tokenizer.model"

#: Texts on which wrong pre-tokenizers, normalizers and prefixes differ.
_PROBES: Final = (
    "Hello world, it's 12345 你好\n\n  x",
    " a leading space,  two, and\ttabs",
    "I'll don't we've; $1,234.56 (A1b2)",
    "def add(a, b):\n    return a+b  # ünïcödé ﬁ É",
    "日本語のテキスト 🙂 мир",
    "   ",
)
#: Special tokens that text is put behind: some prefix every piece of a text, some the first.
_MOST_SPECIAL: Final = 8


def match_with_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer if it does what its file says, else one that does.

    What a tokenizer puts around a text (beginning and end tokens) is for its configuration to
    say and is not compared.

    Args:
        tokenizer: As transformers chose to load it.
        folder: Where it was loaded from.

    Raises:
        UnsupportedModelError: When transformers cannot be brought to read the file as it is.
    """
    read = _open_file(folder)
    if read is None:
        return tokenizer
    wrong = _find_difference(tokenizer, read)
    if wrong is None:
        return tokenizer
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    name, text = type(tokenizer).__name__, wrong
    is_json = (folder / _JSON).is_file()
    for kind in (PreTrainedTokenizerFast,) if is_json else (LlamaTokenizer,):
        other: Any = kind.from_pretrained(str(folder), local_files_only=True)
        if _find_difference(other, read) is None:
            logger.warning(
                "transformers loads the tokenizer of %s as %s, which turns %r into other tokens "
                "than the tokenizer's own file. The file's are used.", folder, name, text,
            )  # fmt: skip
            return other
    raise UnsupportedModelError(
        f"transformers loads the tokenizer of {folder} as {name}, which turns {text!r} into other "
        f"tokens than {_JSON if is_json else _SENTENCEPIECE} does, and no other class reads it "
        "right.",
        advice=(
            f"Put a {_JSON} of this model beside it: the ids would be those of another tokenizer."
            if not is_json
            else "Compare tokenizer_config.json with that of the model's makers."
        ),
    )


def find_differing_text(tokenizer: Any, other: Any) -> str | None:
    """A text that two tokenizers make different ids of, or whose ids they read differently.

    Args:
        tokenizer: One of them.
        other: The other, whose special tokens are tried too.

    Returns:
        The first such text; ``None`` where they agree on all that are tried.
    """
    special = [str(token) for token in other.added_tokens_decoder.values()]
    for text in (*_PROBES, *_put_behind(special)):
        ids = list(other(text)["input_ids"])
        if list(tokenizer(text)["input_ids"]) != ids:
            return text
        if tokenizer.decode(ids) != other.decode(ids):
            return text
    return None


def _put_behind(special: Sequence[str]) -> list[str]:
    return [f"x{token}Hello" for token in special[:_MOST_SPECIAL]]


class _Reading(NamedTuple):
    """What a file itself makes of a text, and of ids where that can be compared."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str] | None = None
    special: Sequence[str] = ()


def _open_file(folder: Path) -> _Reading | None:
    if (folder / _JSON).is_file():
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(folder / _JSON))
        # The package raises bare exceptions; a file that it cannot read is explained elsewhere.
        except Exception as error:
            raise UnsupportedModelError(
                f"{folder / _JSON} is damaged: {error}. Download it again."
            ) from error
        return _Reading(
            lambda text: backend.encode(text, add_special_tokens=False).ids,
            lambda ids: str(backend.decode(list(ids), skip_special_tokens=False)),
            [token.content for token in backend.get_added_tokens_decoder().values()],
        )
    if (folder / _SENTENCEPIECE).is_file() and importlib.util.find_spec("sentencepiece"):
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(folder / _SENTENCEPIECE))
        # Not every file of that name is SentencePiece's: tiktoken and Mistral use it too.
        except (RuntimeError, OSError):
            return None
        return _Reading(pieces.encode)
    return None


def _find_difference(tokenizer: Any, read: _Reading) -> str | None:
    """The first text that a tokenizer treats otherwise than its file."""
    for text in (*_PROBES, *_put_behind(read.special)):
        ids = list(read.encode(text))
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            return text
        if read.decode is not None:
            back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if back != read.decode(ids):
                return text
    return None
