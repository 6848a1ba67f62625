"""Loading: from any source to checked rows, with every bad row reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.data.problems import BadRowPolicy, RowProblem, settle_problems
from qlora_kit.data.rows import Rows
from qlora_kit.data.sources import RawRow, read_source
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from qlora_kit.data.formatter import FormatterBase

__all__ = ["load_rows"]


def load_rows(
    formatter: FormatterBase,
    source: Any,
    split: str,
    *,
    policy: BadRowPolicy,
    local_files_only: bool,
) -> Rows:
    """Read and check rows; see :meth:`FormatterBase.load`."""
    if isinstance(source, Rows):
        if source.has_roles_of(formatter):
            return source.select(range(len(source)), formatter=formatter)
        label = source.source
        raw = [RawRow(source.get_location(index), value) for index, value in enumerate(source)]
    else:
        label, raw = read_source(source, split, local_files_only=local_files_only)
    if not raw:
        raise DataError(f"{label} has no rows. Training takes at least one.")
    _check_columns(formatter, raw, label)
    values: list[dict[str, Any]] = []
    locations = []
    problems: list[RowProblem] = []
    for row in raw:
        if row.problem:
            problems.append(RowProblem(row.location, row.problem))
        elif not isinstance(row.value, Mapping):
            problems.append(
                RowProblem(
                    row.location, f"is {type(row.value).__name__}, not an object with columns"
                )
            )
        else:
            value, reasons = formatter.parse_row(row.value)
            if reasons:
                problems.append(RowProblem(row.location, ", ".join(reasons)))
            else:
                values.append(value)
                locations.append(row.location)
    settle_problems(
        problems,
        total=len(raw),
        source=label,
        policy=policy,
        limit=formatter.max_reported_rows,
    )
    if not values:
        raise DataError(f"No row of {label} can be used; the log lists what is wrong with them.")
    return Rows(values, formatter=formatter, source=label, locations=locations)


def _check_columns(formatter: FormatterBase, raw: Sequence[RawRow], label: str) -> None:
    """One message instead of one per row when a whole column is absent."""
    mappings = [row.value for row in raw if isinstance(row.value, Mapping)]
    if not mappings:
        return
    present = {str(key): None for row in mappings for key in row}
    missing = formatter.find_missing_columns(list(present))
    if missing:
        role = next(iter(missing))
        example = next((name for name in present if name not in formatter.columns.values()), "...")
        raise DataError(
            f"No row of {label} has a column {' or '.join(map(repr, missing.values()))}. Its "
            f"columns are: {', '.join(map(repr, list(present)[:12]))}. Say which one it is, for "
            f"example columns={{{role!r}: {example!r}}}."
        )
