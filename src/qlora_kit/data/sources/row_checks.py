"""Loading: from any source to checked rows, with every bad row reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from qlora_kit.data.sources.raw_rows import RawRow, RawRows, read_source
from qlora_kit.data.sources.row_problems import BadRows, Location, RowProblem, settle_problems
from qlora_kit.data.sources.rows import RowRoles, Rows, UnusedData, is_filled
from qlora_kit.errors import DataError
from qlora_kit.messages import Call, Setting

__all__ = ["RowSchema", "check_columns", "load_rows", "parse_rows"]

#: The roles of a raw row, and what is wrong with it.
RowParser = Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]


class RowSchema(NamedTuple):
    """What rows of a kind hold.

    Attributes:
        parse: Reads a raw row.
        find_missing: Roles whose column is not among those present, with that column.
        columns: Which column holds which role.
        list_used: The columns that are read, of those present; ``None`` where that is not known.
    """

    parse: RowParser
    find_missing: Callable[[Sequence[str]], Mapping[str, str]]
    columns: Mapping[str, str]
    list_used: Callable[[Sequence[str]], set[str] | None]


#: What people call the columns of a role.
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = {
    "instruction": ("instruction", "question", "query", "prompt", "task", "request", "user", "q"),
    "input": ("input", "context", "passage", "document"),
    "output": ("output", "answer", "response", "completion", "target", "reply", "solution", "a"),
    "prompt": ("prompt", "question", "instruction", "query", "input", "q"),
    "completion": ("completion", "answer", "response", "output", "target", "reply", "a"),
    "text": ("text", "content", "body", "document"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
}
#: Columns that are about a row, and not its text.
_NO_TEXT: Final = frozenset({"id", "idx", "index", "uid", "uuid", "date", "time", "url", "source"})

#: Columns that mean something no formatter here carries out, and what they mean.
_REFUSED: Final = {
    "chosen": "the better of two answers; give it as the answer itself",
    "rejected": "the worse of two answers, which is not to be learned; leave the column out",
    "images": "pictures, which a text model cannot learn",
    "image": "a picture, which a text model cannot learn",
    "videos": "films, which a text model cannot learn",
    "audios": "sound, which a text model cannot learn",
}


def load_rows(
    source: Any,
    split: str,
    schema: RowSchema,
    bad_rows: BadRows,
    *,
    formatter: RowRoles,
    local_files_only: bool,
) -> Rows:
    """Read and check rows, which are ``formatter``'s afterwards; see :meth:`FormatterBase.load`."""
    if isinstance(source, Rows):
        if source.has_roles_of(formatter):
            return source.select(range(len(source)), formatter=formatter)
        raw = [RawRow(source.get_location(index), value) for index, value in enumerate(source)]
        read = RawRows(source.source, raw, source.origin)
    else:
        read = read_source(source, split, local_files_only=local_files_only)
    check_columns(read, schema.find_missing, schema.columns)
    values, locations = parse_rows(read, schema.parse, bad_rows)
    return Rows(
        values,
        formatter=formatter,
        source=read.label,
        locations=locations,
        unused=_find_unused(read, schema),
        origin=read.origin,
    )


def _find_unused(source: RawRows, schema: RowSchema) -> list[UnusedData]:
    """Columns that say something and are not read.

    Raises:
        DataError: When one is known to mean something that would be missing.
    """
    values: dict[str, list[Any]] = {}
    # What is read depends on what else a row says, and rows of several data sets may differ.
    used_by_columns: dict[tuple[str, ...], set[str] | None] = {}
    for row in source.rows:
        if not isinstance(row.value, Mapping):
            continue
        filled = {str(name): value for name, value in row.value.items() if is_filled(value)}
        columns = tuple(filled)
        if columns not in used_by_columns:
            used_by_columns[columns] = schema.list_used(columns)
        used = used_by_columns[columns]
        for name, value in filled.items():
            if name in _REFUSED if used is None else name not in used:
                values.setdefault(name, []).append(value)
    for name, found in values.items():
        if name in _REFUSED and name not in schema.columns.values():
            raise DataError(
                f"{len(found):,} rows of {source.label} have a column {name!r}: {_REFUSED[name]}. "
                "Remove the column if the rows make sense without it."
            )
    return [
        UnusedData(f"the column {name!r}", len(found), found[0]) for name, found in values.items()
    ]


def parse_rows(
    source: RawRows, parse: RowParser, bad_rows: BadRows
) -> tuple[list[dict[str, Any]], list[Location]]:
    """The roles of every row that can be used, and where each was.

    Args:
        source: What was read.
        parse: The roles of a raw row, and what is wrong with it.
        bad_rows: What happens to rows that cannot be used.

    Raises:
        DataError: When rows cannot be used and are not to be skipped, or none can.
    """
    values: list[dict[str, Any]] = []
    locations: list[Location] = []
    problems: list[RowProblem] = []
    for row in source.rows:
        if row.problem:
            problems.append(RowProblem(row.location, row.problem))
        elif not isinstance(row.value, Mapping):
            problems.append(
                RowProblem(
                    row.location, f"is {type(row.value).__name__}, not an object with columns"
                )
            )
        else:
            value, reasons = parse(row.value)
            if reasons:
                problems.append(RowProblem(row.location, ", ".join(reasons)))
            else:
                values.append(value)
                locations.append(row.location)
    settle_problems(
        problems,
        total=len(source.rows),
        source=source.label,
        bad_rows=bad_rows,
    )
    if not values:
        raise DataError(
            f"No row of {source.label} can be used; the log lists what is wrong with them."
        )
    return values, locations


def check_columns(
    source: RawRows,
    find_missing: Callable[[Sequence[str]], Mapping[str, str]],
    columns: Mapping[str, str],
) -> None:
    """Refuse a source without rows, or one where a whole column is absent.

    Args:
        source: What was read.
        find_missing: Roles whose column is not among those present, with that column.
        columns: Which column holds which role.

    Raises:
        DataError: With one message instead of one per row.
    """
    if not source.rows:
        raise DataError(f"{source.label} has no rows. Training takes at least one.")
    present = source.columns
    if not present:
        return
    missing = find_missing(present)
    if missing:
        role = next(iter(missing))
        example = _guess_column(role, present, columns) or "..."
        raise DataError(
            f"No row of {source.label} has a column {' or '.join(map(repr, missing.values()))}. "
            f"Its columns are: {', '.join(map(repr, present[:12]))}.",
            parameter="columns",
            advice=(
                *_name_fitting_formatter(source),
                "Say which one it is, for example ",
                Setting("columns", {role: example}, "formatter"),
                ".",
            ),
        )


def _guess_column(role: str, present: Sequence[str], columns: Mapping[str, str]) -> str | None:
    """The column that most likely holds a role, by the names that people give it."""
    free = [name for name in present if name not in columns.values()]
    words = _SYNONYMS.get(role, ())
    for word in words:
        for name in free:
            if name.strip().casefold() == word:
                return name
    for word in words:
        for name in free:
            if len(word) > 2 and word in name.casefold():
                return name
    taken = {word for other, known in _SYNONYMS.items() if other != role for word in known}
    plain = [name for name in free if name.strip().casefold() not in taken | _NO_TEXT]
    return next(iter(plain), None)


def _name_fitting_formatter(source: RawRows) -> tuple[object, ...]:
    """The formatter that rows with these columns are for, where that is plain."""
    names = set(source.columns)
    if names & {"messages", "conversations"}:
        return (
            "They look like conversations: ",
            Call("ChatFormatter", "ChatFormatter(tokenizer)"),
            ". ",
        )
    if {"chosen", "rejected"} <= names:
        return (
            "They look like pairs of a better and a worse answer, which are not learned here; ",
            "give the better one as the answer. ",
        )
    if {"prompt", "completion"} <= names:
        in_parts = any(
            isinstance(row.value, Mapping) and isinstance(row.value.get("prompt"), list)
            for row in source.rows[:1]
        )
        if in_parts:
            return (
                "They look like conversations in two parts: ",
                Call("ChatFormatter", "ChatFormatter(tokenizer)"),
                ". ",
            )
        return (
            "They look like prompts with completions: ",
            Call("PromptCompletionFormatter", "PromptCompletionFormatter(tokenizer)"),
            ". ",
        )
    return ()
