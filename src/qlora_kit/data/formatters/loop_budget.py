"""A limit on how long a template may loop, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

__all__ = ["LoopBudget"]

#: Real templates loop over a conversation's messages; none counts to a million.
_MOST_ROUNDS: Final = 1_000_000


class LoopBudget:
    """Counts the rounds of one rendering, over all of its loops.

    Jinja's sandbox limits one ``range`` and not what loops inside each other multiply to.
    """

    def __init__(self, most: int = _MOST_ROUNDS) -> None:
        self._left = self._most = most

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
