"""How the command line reads values: JSON where it parses as such, text otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from qlora_kit.errors import ConfigError

__all__ = [
    "read_columns",
    "read_list",
    "read_mapping",
    "read_settings",
    "read_value",
    "split_names",
]


def read_value(text: str) -> Any:
    """A value as JSON or as Python writes it, or the text itself.

    Raises:
        ConfigError: For numbers and JSON beyond what Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
    # Whole numbers of more digits than Python reads.
    except ValueError as error:
        raise ConfigError("A number has too many digits to be read.") from error
    except RecursionError as error:
        raise ConfigError("JSON is nested too deeply to be read.") from error


def read_list(text: str) -> Any:
    """Values by comma, or a JSON list; one value alone stays itself."""
    value = read_value(text)
    if isinstance(value, str) and "," in value:
        return [read_value(part) for part in split_names(value)]
    return value


def read_mapping(text: str, flag: str) -> dict[str, Any]:
    """``name=value`` pairs by comma, or a JSON object.

    Raises:
        ConfigError: When it is neither.
    """
    value = read_value(text)
    if isinstance(value, dict):
        return value
    pairs = [part.partition("=") for part in split_names(text)]
    if not pairs or any(not name.strip() or not equals for name, equals, _ in pairs):
        raise ConfigError(f"{flag} takes NAME=VALUE, several by comma.")
    return {name.strip(): read_value(value.strip()) for name, _, value in pairs}


def read_settings(
    pairs: Sequence[str],
    *taken: str,
    flag: str = "--set",
    takes_list: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """``name=value`` pairs.

    Args:
        pairs: What was given.
        *taken: Names that the command line has arguments of its own for.
        flag: What they were given to.
        takes_list: Whether the argument of a name takes several values, which may then be given
            by comma.

    Raises:
        ConfigError: When one is not of the form NAME=VALUE, or its name is taken.
    """
    settings: dict[str, Any] = {}
    for number, pair in enumerate(pairs, 1):
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        # Not shown itself: what was to be its name may be a token.
        if not equals or not name:
            which = f"number {number}" if len(pairs) > 1 else "this one"
            lacks = "name before its '='" if equals else "'='"
            raise ConfigError(f"{flag} takes NAME=VALUE, and {which} has no {lacks}.")
        if name in taken:
            raise ConfigError(f"{flag} {name}: it has an argument of its own, see --help.")
        is_list = takes_list is not None and takes_list(name)
        try:
            settings[name] = read_list(text) if is_list else read_value(text)
        except ConfigError as error:
            raise error.after(f"{flag} {name}: ") from error
    return settings


def read_columns(pairs: Sequence[str]) -> dict[str, str] | None:
    """``role=column`` pairs, several by comma; ``None`` if there are none.

    Raises:
        ConfigError: When one is not of the form ROLE=COLUMN.
    """
    columns: dict[str, str] = {}
    for pair in (part for given in pairs for part in split_names(given)):
        role, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not role or not column:
            raise ConfigError(
                f"--columns takes ROLE=COLUMN, such as instruction=question, got {pair!r}."
            )
        columns[role] = column
    return columns or None


def split_names(text: str) -> list[str]:
    """Names by comma, without the space around them.

    Raises:
        ConfigError: When something was given and names nothing.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text and not names:
        raise ConfigError(f"{text!r} names nothing. Give names, with commas between them.")
    return names
