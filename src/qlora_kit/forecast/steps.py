"""How large steps are, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RowTokens", "StepShape", "find_attended"]


def find_attended(examples: Sequence[int]) -> float:
    """Tokens of the example that an average token lies in; long ones have more of the tokens."""
    return sum(size * size for size in examples) / max(1, sum(examples))


@dataclass(frozen=True)
class StepShape:
    """How large steps are, in tokens.

    Attributes:
        longest: Of the longest example.
        largest: Of the largest effective batch.
        usual: Of an average effective batch.
        rows: Rows of a micro-batch, where rows are padded to its longest.
    """

    longest: int
    largest: int
    usual: int
    rows: int = 2


@dataclass(frozen=True)
class RowTokens:
    """Lengths of the rows that will be trained on, longest first.

    Attributes:
        sizes: Tokens of each row; of a packed row, of all its examples.
        longest: Tokens of the longest example.
        rows: How many rows there are; more than ``sizes`` where one stands for all.
        attended: Tokens of the example that an average token lies in, which bound what it attends
            to; ``None`` where each row is one example.
    """

    sizes: tuple[int, ...]
    longest: int
    rows: int
    attended: float | None = None

    @property
    def average(self) -> float:
        """Tokens of an average row."""
        return sum(self.sizes) / max(1, len(self.sizes))

    @property
    def average_attended(self) -> float:
        """Tokens of the example that an average token lies in."""
        if self.attended is not None:
            return self.attended
        return find_attended(self.sizes)

    def cut(self, most: int) -> RowTokens:
        """The same rows with none beyond ``most`` tokens."""
        sizes = tuple(min(size, most) for size in self.sizes)
        attended = None if self.attended is None else min(self.attended, most)
        return RowTokens(sizes, min(self.longest, most), self.rows, attended)

    def of_steps(self, micro_batch: int, accumulation: int) -> StepShape:
        """The sizes of steps of so many rows."""
        rows = micro_batch * accumulation
        largest = sum(self.sizes[:rows]) if len(self.sizes) > 1 else self.sizes[0] * rows
        usual = int(self.average * min(rows, max(1, self.rows)))
        return StepShape(self.longest, max(largest, self.longest), max(1, usual), micro_batch)
