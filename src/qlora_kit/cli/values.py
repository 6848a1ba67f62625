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
    """A value as JSON or as Python writes it, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


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
        raise ConfigError(f"{flag} takes NAME=VALUE, several by comma, got {text!r}.")
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
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"{flag} takes NAME=VALUE, got {pair!r}.")
        if name in taken:
            raise ConfigError(f"{flag} {pair}: {name} has an argument of its own, see --help.")
        is_list = takes_list is not None and takes_list(name)
        settings[name] = read_list(text) if is_list else read_value(text)
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
    """Names by comma, without the space around them."""
    return [name.strip() for name in text.split(",") if name.strip()]
