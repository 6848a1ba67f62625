"""Files of rows: JSON, JSON lines, CSV and Parquet, each row with the line it starts on.

A broken line of a line-based file is a bad row like any other; a file that cannot be read at
all raises, with the line and what was expected there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from qlora_kit.data.sources.row_problems import Location
from qlora_kit.errors import DataError

__all__ = ["READERS", "RawRow", "drop_nulls_inside", "read_file"]


#: Bytes that a table may have whatever its file has; and how many for each of the file's own.
_SURELY_FITS: Final = 512 * 1024**2
_MOST_UNPACKED: Final = 1000
_ROWS_AT_ONCE: Final = 256


class RawRow(NamedTuple):
    """A row as its source has it.

    Attributes:
        location: Where it is.
        value: What it is; a dictionary if all is well.
        problem: Why it could not be read, if it could not.
    """

    location: Location
    value: Any
    problem: str | None = None


def read_file(path: Path) -> list[RawRow]:
    """The rows of one file, read by its suffix.

    Raises:
        DataError: When the file is of no known kind, or cannot be read as its kind.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} is of no known kind; known are {', '.join(READERS)}."
            if path.suffix
            else f"{path} has no suffix that says what it is; known are {', '.join(READERS)}."
        )
    try:
        return reader(path)
    except DataError:
        raise
    # ValueError: numbers of thousands of digits; RecursionError: nesting without end.
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_text(path: Path) -> str:
    """A UTF-8 file's text, with or without a byte order mark."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise DataError(
            f"{path}, line 1: the file looks like UTF-16; UTF-8 was expected. "
            f"{_advise_conversion(path, 'utf-16')}"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = _guess_encoding(data)
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8, which was expected"
            + (f"; the file looks like {guess}. " if guess else ". ")
            + _advise_conversion(path, guess or "THE-RIGHT-ENCODING")
        ) from error


def _guess_encoding(data: bytes) -> str | None:
    """The likeliest of a few encodings: a hint for a message, never acted upon."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    # Accented letters stand between plain ones; Chinese and Japanese come in runs of bytes.
    if runs.count(1) > 0.2 * len(runs):
        return "windows-1252"
    for name in ("gb18030", "big5", "shift_jis"):
        with contextlib.suppress(UnicodeDecodeError):
            data.decode(name)
            return name
    return None


def _advise_conversion(path: Path, encoding: str) -> str:
    return f"Convert it: iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}"


def _read_json(path: Path) -> list[RawRow]:
    """An array of objects, or an object that holds one; JSON lines under the wrong suffix too."""
    text = _read_text(path)
    start = _skip_space(text, 0)
    if start == len(text):
        raise DataError(f"{path} is empty; an array of objects was expected.")
    if text[start] == "[":
        return _read_array(path, text, start)
    if text[start] != "{":
        raise DataError(
            f"{path}, line {text.count(chr(10), 0, start) + 1}: an array of objects was expected, "
            f"the file starts with {text[start : start + 20]!r}."
        )
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, {_explain(error, text)}.") from error
    if _skip_space(text, end) < len(text):
        return _read_lines(path, text)
    for key in ("data", "rows", "train", "examples"):
        if isinstance(value.get(key), list):
            return [RawRow(Location(index), row) for index, row in enumerate(value[key])]
    return [RawRow(Location(0, text.count("\n", 0, start) + 1), value)]


def _read_array(path: Path, text: str, start: int) -> list[RawRow]:
    decoder = json.JSONDecoder()
    rows: list[RawRow] = []
    line, counted = 1, 0
    position = _skip_space(text, start + 1)
    while True:
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text):
            raise DataError(
                f"{path}, line {line}: the file ends after {len(rows):,} complete rows where "
                "another row or ']' was expected. It is cut off; copy or download it again."
            )
        if text[position] == "]":
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            is_cut = "Unterminated" in error.msg or error.pos >= len(text.rstrip())
            raise DataError(
                f"{path}, {_explain(error, text)}, in row {len(rows) + 1}, which starts on line "
                f"{line}." + (" The file is cut off; copy or download it again." if is_cut else "")
            ) from error
        rows.append(RawRow(Location(len(rows), line), value))
        position = _skip_space(text, position)
        if position < len(text) and text[position] == ",":
            position = _skip_space(text, position + 1)
            if position < len(text) and text[position] == "]":
                raise DataError(
                    f"{path}, line {text.count(chr(10), 0, position) + 1}: another row was "
                    "expected after the comma, found ']'. Remove the last comma."
                )
        elif position < len(text) and text[position] != "]":
            raise DataError(
                f"{path}, line {text.count(chr(10), 0, position) + 1}: ',' or ']' was expected "
                f"after row {len(rows)}, found {text[position : position + 20]!r}."
            )
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise DataError(
            f"{path}, line {text.count(chr(10), 0, rest) + 1}: the file was expected to end after "
            f"']', found {text[rest : rest + 20]!r}."
        )
    return rows


def _read_jsonl(path: Path) -> list[RawRow]:
    text = _read_text(path)
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        return _read_array(path, text, start)
    return _read_lines(path, text)


def _read_lines(path: Path, text: str) -> list[RawRow]:
    rows: list[RawRow] = []
    # Not splitlines(): it also splits at U+2028 and others, which may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        location = Location(len(rows), number)
        try:
            rows.append(RawRow(location, json.loads(line)))
        except json.JSONDecodeError as error:
            found = line.strip()
            shown = found if len(found) <= 60 else found[:57] + "..."
            problem = (
                f"is not a JSON object ({error.msg} at column {error.colno}): {shown!r}; one "
                "complete object per line was expected"
            )
            rows.append(RawRow(location, None, problem))
    return rows


def _read_csv(path: Path) -> list[RawRow]:
    text = _read_text(path)
    # The limit guards against runaway quotes; answers longer than its 128 KiB are real.
    limit = csv.field_size_limit(max(len(text) + 1, 131072))
    try:
        return _parse_csv(path, text)
    finally:
        csv.field_size_limit(limit)


def _parse_csv(path: Path, text: str) -> list[RawRow]:
    first_line = text[: text.find("\n")] if "\n" in text else text
    delimiter = next((mark for mark in ",;\t" if mark in first_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[RawRow] = []
    header: list[str] | None = None
    last_line = 0
    try:
        for fields in reader:
            line, last_line = last_line + 1, reader.line_num
            if not fields:
                continue
            if header is None:
                # Blanks around a name are there for whoever reads the file.
                header = [name.strip() for name in fields]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise DataError(f"{path}, line {line}: the header names {twice[0]!r} twice.")
                continue
            problem = None
            if len(fields) != len(header):
                problem = f"has {len(fields)} fields, the header has {len(header)}"
            value = dict(zip(header, fields, strict=False))
            rows.append(RawRow(Location(len(rows), line), value, problem))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {last_line + 1}: not valid CSV ({error}). A field with a comma, a quote "
            'or a line break is written in double quotes, a quote inside it twice ("").'
        ) from error
    if header is None:
        raise DataError(f"{path} is empty; a header line with the columns' names was expected.")
    return rows


def _read_parquet(path: Path) -> list[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        _check_unpacked_size(path)
        table = pyarrow.parquet.read_table(path)
    # ArrowException: whatever a damaged file makes of it.
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a Parquet file that can be read ({error}). If it came from git, it may "
            "be a Git LFS pointer: run git lfs pull."
        ) from error
    return [
        RawRow(Location(index), drop_nulls_inside(value))
        for index, value in enumerate(table.to_pylist())
    ]


def _check_unpacked_size(path: Path) -> None:
    """Refuse a file that unpacks to far more than any table does, before it is unpacked.

    A dictionary of one long text, and a number for each of a million rows, is a kilobyte.
    """
    import pyarrow.parquet

    packed = path.stat().st_size
    most = max(_SURELY_FITS, _MOST_UNPACKED * packed)
    with pyarrow.parquet.ParquetFile(path) as file:
        about = file.metadata
        stored = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
        unpacked = stored
        if stored <= most and about.num_rows * stored > most:
            unpacked = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                unpacked += batch.nbytes
                if unpacked > most:
                    break
    if unpacked > most:
        raise DataError(
            f"{path} has {packed:,} bytes and unpacks to more than {most:,}, which no table of "
            "texts does. Look at what wrote it."
        )


def drop_nulls_inside(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls that Arrow put into it.

    All objects of a column have the same keys there, so that a tool call comes back with the
    arguments of every other tool, null each. The row's own columns stay.
    """
    return {
        name: value if isinstance(value, str) else _drop_nulls(value) for name, value in row.items()
    }


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_drop_nulls(inner) for inner in value]
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _explain(error: json.JSONDecodeError, text: str) -> str:
    found = text[error.pos : error.pos + 20]
    expected = error.msg[0].lower() + error.msg[1:]
    return (
        f"line {error.lineno}, column {error.colno}: {expected}, found "
        f"{repr(found) if found else 'the end of the file'}"
    )


#: How files are read, by suffix.
READERS: Final[dict[str, Callable[[Path], list[RawRow]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
