"""Rows that have been read and checked, ready to be formatted."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, overload

from qlora_kit.data.sources.origins import RowOrigin
from qlora_kit.data.sources.row_problems import Location
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.values import is_number

__all__ = ["RowRoles", "Rows", "UnusedData", "is_filled"]


class UnusedData(NamedTuple):
    """What stands in rows and reaches no example.

    Attributes:
        what: Where it stands, in words.
        times: How many rows or messages have it.
        example: One of its values.
    """

    what: str
    times: int
    example: Any

    def __str__(self) -> str:
        shown = repr(self.example)
        shown = shown if len(shown) < 50 else shown[:47] + "..."
        return f"{self.what} ({self.times:,}, such as {shown})"


def is_filled(value: Any) -> bool:
    """Whether a column says anything in a row."""
    return not (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str | list | tuple | dict) and not value)
    )


class RowRoles(Protocol):
    """What rows need to know of a formatter: the roles that it reads."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that every row fills."""
        ...

    @property
    def optional_roles(self) -> tuple[str, ...]:
        """Roles that may be missing or empty."""
        ...


class Rows(Sequence[dict[str, Any]]):
    """Checked rows of a dataset, each a dictionary from role to value.

    Attributes:
        formatter: The formatter that read them.
        source: Where they came from, in words.
        unused: What stands in them and reaches no example.
        origin: What it takes to read them again; ``None`` where some were chosen in memory.
    """

    def __init__(
        self,
        values: Sequence[dict[str, Any]],
        *,
        formatter: Any,
        source: str,
        locations: Sequence[Location] | None = None,
        unused: Sequence[UnusedData] = (),
        origin: RowOrigin | None = None,
    ) -> None:
        self._values = list(values)
        self._locations = (
            [Location(index) for index in range(len(self._values))]
            if locations is None
            else list(locations)
        )
        self.formatter = formatter
        self.source = source
        self.unused = tuple(unused)
        self.origin = origin

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._values)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._values[index]

    def __repr__(self) -> str:
        return f"Rows({len(self):,} from {self.source})"

    @property
    def fingerprint(self) -> str:
        """A digest of the rows' content and order; where they came from does not matter."""
        digest = hashlib.sha256()
        for value in self._values:
            digest.update(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
            digest.update(b"\n")
        return digest.hexdigest()[:16]

    def note_unused(self, unused: UnusedData) -> None:
        """Add something that reaches no example."""
        self.unused += (unused,)

    def describe_unused(self) -> str:
        """All that reaches no example, in one sentence; empty where there is nothing."""
        if not self.unused:
            return ""
        return f"Not used of {self.source}: {'; '.join(map(str, self.unused))}."

    def has_roles_of(self, formatter: RowRoles) -> bool:
        """Whether another formatter can take these rows as they are."""
        own: RowRoles = self.formatter
        return (own.roles, own.optional_roles) == (formatter.roles, formatter.optional_roles)

    def get_location(self, index: int) -> Location:
        """Where the row at ``index`` stood in its source."""
        return self._locations[index]

    def select(self, indices: Iterable[int], *, formatter: Any = None) -> Rows:
        """The rows at ``indices``, in that order; for another formatter of the kind, if given."""
        chosen = list(indices)
        is_whole = chosen == list(range(len(self)))
        return Rows(
            [self._values[index] for index in chosen],
            formatter=formatter or self.formatter,
            source=self.source,
            locations=[self._locations[index] for index in chosen],
            unused=self.unused,
            origin=self.origin if is_whole else None,
        )

    def split(self, fraction: float, seed: int = 3407) -> tuple[Rows, Rows]:
        """Split off a random share, for evaluation.

        Args:
            fraction: Share of the rows to hold out, between 0 and 1.
            seed: The same seed holds out the same rows.

        Returns:
            The rows to train on and the held-out rows, each in their original order.

        Raises:
            ConfigError: When ``fraction`` is not between 0 and 1.
            DataError: When there are too few rows for both parts.
        """
        if not is_number(fraction) or not 0.0 < fraction < 1.0:
            raise ConfigError(f"fraction is a share between 0 and 1, got {fraction!r}.")
        if len(self) < 2:
            raise DataError(f"{self.source} has {len(self)} row; splitting takes at least 2.")
        count = min(max(round(len(self) * fraction), 1), len(self) - 1)
        held_out = set(random.Random(seed).sample(range(len(self)), count))
        kept = self.select(index for index in range(len(self)) if index not in held_out)
        split_off = self.select(sorted(held_out))
        if self.origin is not None and self.origin.held_out is None:
            kept.origin = self.origin._replace(held_out=(fraction, seed, "train"))
            split_off.origin = self.origin._replace(held_out=(fraction, seed, "eval"))
        return kept, split_off
