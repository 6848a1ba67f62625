"""The one representation of an example before it is tokens: a list of segments.

A formatter says what the text of a row is and which parts of it are learned. Everything
after that (token ids, the loss mask, padding, packing) follows from these segments alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = ["Prompt", "Segment"]


class Segment(NamedTuple):
    """A piece of an example that is tokenized by itself.

    Attributes:
        text: The text. Anything in it that looks like a special token stays ordinary text.
        is_trained: Whether its tokens carry loss.
        is_special: Whether ``text`` is the name of one token, such as ``"<|im_end|>"``, and
            stands for that token.
        is_excluded: Whether its tokens carry no loss even where whole examples are trained.
    """

    text: str
    is_trained: bool = False
    is_special: bool = False
    is_excluded: bool = False


class Prompt(str):
    """A prompt as text, with the very token ids that training would put before the answer.

    Tokenizing the text again may give other ids: a tokenizer reads special tokens out of
    what a user typed, and adds its own.

    Attributes:
        token_ids: The ids, the beginning-of-text token included where the tokenizer adds one.
    """

    token_ids: list[int]

    def __new__(cls, text: str, token_ids: Iterable[int]) -> Prompt:
        """Attach ``token_ids`` to ``text``."""
        prompt = super().__new__(cls, text)
        prompt.token_ids = list(token_ids)
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self), self.token_ids))
