"""Limits on what a template may compute, the same on every machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, overload

__all__ = ["LoopBudget"]

#: Real templates loop over a conversation's messages; none counts to a million.
_MOST_ROUNDS: Final = 1_000_000

#: Nor has one a number of eight digits, or a field as wide: they multiply texts beyond memory.
_MOST_NUMBER: Final = 10_000_000
_WIDE_FIELD: Final = re.compile(r"%[-+ #0]*[1-9]\d{7,}|\{[^{}]*:[^{}]*[1-9]\d{7,}")


class LoopBudget:
    """Counts the rounds of one rendering, over all of its loops.

    Jinja's sandbox limits one ``range`` and not what loops inside each other multiply to.
    """

    def __init__(self, most: int = _MOST_ROUNDS) -> None:
        self._left = self._most = most

    @classmethod
    def of(cls, template: object) -> LoopBudget:
        """The budget of one rendering of a template.

        Raises:
            OverflowError: When the template computes what no memory holds.
        """
        if isinstance(template, str):
            _check_numbers(template)
        return cls()

    def make_range(self, *bounds: int) -> CountedRange:
        """``range`` for a template."""
        return CountedRange(range(*bounds), self)

    def spend(self) -> None:
        """Take one round.

        Raises:
            OverflowError: When there is none left.
        """
        self._left -= 1
        if self._left < 0:
            raise OverflowError(f"it loops more than {self._most:,} times")


class CountedRange(Sequence[int]):
    """A ``range`` each of whose rounds is counted, however often it is gone through."""

    def __init__(self, numbers: range, budget: LoopBudget) -> None:
        self._numbers, self._budget = numbers, budget

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> CountedRange: ...
    def __getitem__(self, index: int | slice) -> Any:
        found = self._numbers[index]
        return CountedRange(found, self._budget) if isinstance(found, range) else found

    def __contains__(self, value: object) -> bool:
        return value in self._numbers

    def __iter__(self) -> Iterator[int]:
        for number in self._numbers:
            self._budget.spend()
            yield number

    def __reversed__(self) -> Iterator[int]:
        return iter(CountedRange(self._numbers[::-1], self._budget))


@lru_cache(maxsize=64)
def _check_numbers(template: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = list(Environment(autoescape=False).lex(template))  # noqa: S701 - text, no pages
    # Whoever renders it says what is wrong with it.
    except TemplateSyntaxError:
        return
    for _, kind, text in tokens:
        if kind == "operator" and text == "**":
            raise OverflowError("it computes a power, as no chat template has to")
        if kind in ("integer", "float") and _is_too_large(kind, text.replace("_", "")):
            raise OverflowError(f"it computes with the number {text[:20]}")
        if kind == "string" and _WIDE_FIELD.search(text):
            raise OverflowError("it formats a field of millions of characters")


def _is_too_large(kind: str, text: str) -> bool:
    try:
        number: float = int(text, 0) if kind == "integer" else float(text)
    # More digits than Python reads, or zeros in front, which Jinja takes.
    except ValueError:
        return len(text.lstrip("0")) > 8
    return number >= _MOST_NUMBER
