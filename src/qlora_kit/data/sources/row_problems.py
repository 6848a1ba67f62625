"""Bad rows: where they are, what is wrong, and how all of them are reported at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from qlora_kit.errors import DataError, invalid_value
from qlora_kit.messages import Setting

__all__ = [
    "BadRowPolicy",
    "BadRows",
    "Location",
    "RowProblem",
    "check_policy",
    "check_text",
    "settle_problems",
]

logger = logging.getLogger(__name__)

BadRowPolicy = Literal["raise", "skip"]


class Location(NamedTuple):
    """Where a row came from.

    Attributes:
        place: Its place among the rows of its source, counted from 0.
        line: The line it starts on, counted from 1, where the source has lines.
        file: The file's name, where a source has several files.
    """

    place: int
    line: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        where = f"row {self.place + 1}"
        if self.line is not None:
            where = f"line {self.line} ({where})"
        else:
            where = f"{where} (index {self.place})"
        return f"{self.file}, {where}" if self.file else where


class RowProblem(NamedTuple):
    """One row that cannot be used, and why."""

    location: Location
    reason: str


class BadRows(NamedTuple):
    """What happens to rows that cannot be used.

    Attributes:
        policy: Whether they are refused or left out.
        limit: How many of them a message lists one by one.
    """

    policy: BadRowPolicy = "raise"
    limit: int = 10


def check_policy(on_bad_rows: str) -> BadRowPolicy:
    """The policy, if it is one."""
    if on_bad_rows not in ("raise", "skip"):
        raise invalid_value("on_bad_rows", "must be 'raise' or 'skip'", on_bad_rows, "formatter")
    return on_bad_rows  # type: ignore[return-value]


_CORRECT_OR_SKIP: Final = (
    "Correct them, or leave them out with ",
    Setting("on_bad_rows", "skip", "formatter"),
    ".",
)


def settle_problems(
    problems: Sequence[RowProblem],
    *,
    total: int,
    source: str,
    bad_rows: BadRows,
    advice: Sequence[str | Setting] = _CORRECT_OR_SKIP,
) -> None:
    """Report every bad row at once: as an error, or as a warning where they are skipped.

    Raises:
        DataError: When there are problems and the policy is ``"raise"``.
    """
    if not problems:
        return
    policy, limit = bad_rows
    lines = [f"  {problem.location}: {problem.reason}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  and {len(problems) - limit:,} more, by reason:")
        counts = Counter(problem.reason for problem in problems[limit:])
        lines += [f"    {count:,} x {reason}" for reason, count in counts.most_common(5)]
    share = f"{len(problems):,} of {total:,} rows of {source} cannot be used"
    listing = "\n".join(lines)
    if policy == "raise":
        # On a line of its own.
        raise DataError(f"{share}:\n{listing}\n", *advice)
    logger.warning("%s and are left out:\n%s", share, listing)


def check_text(value: Any, *, may_be_empty: bool = False) -> str | None:
    """What keeps a value from being text to train on, or ``None``."""
    if value is None:
        return "is null"
    if isinstance(value, bool):
        return f"is not text but a truth value ({value})"
    if isinstance(value, int | float):
        return f"is not text but a number ({value})"
    if isinstance(value, list | tuple):
        return f"is not text but a list of {len(value)}"
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, list(value)[:3]))
        return f"is not text but an object with {keys or 'no keys'}"
    if not isinstance(value, str):
        return f"is not text but {type(value).__name__}"
    if not value.strip() and not may_be_empty:
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair, which is not a character"
    return None
