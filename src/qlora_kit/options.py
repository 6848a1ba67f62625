"""Turning keyword arguments into an exporter's options, and saying what is wrong with them.

This module knows dataclasses. It does not know exporters.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Final, Literal, Union, get_args, get_origin

from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean

__all__ = ["COLLECTS_UNKNOWN", "OptionInfo", "build_options", "describe_option_fields"]

#: Key in a field's metadata: keywords that are no field of the dataclass go into this one.
COLLECTS_UNKNOWN: Final = "qlora_kit.collects_unknown"


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One option of a format, for showing to people.

    Attributes:
        name: The keyword.
        type: Its annotation as written.
        default: The default as Python shows it, or ``None`` when the option must be given.
    """

    name: str
    type: str
    default: str | None


def build_options(options_type: type, given: Mapping[str, Any], *, owner: str) -> Any:
    """An instance of ``options_type`` from keywords.

    Args:
        options_type: A dataclass.
        given: Keyword arguments.
        owner: What messages call the format, for example ``"merged_16bit"``.

    Raises:
        UnknownOptionError: When there is no such option; names the nearest.
        ConfigError: When a value is of the wrong type, or an option is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(options_type) if field.init}
    collector = next((f for f in fields.values() if f.metadata.get(COLLECTS_UNKNOWN)), None)
    unknown = {name: value for name, value in given.items() if name not in fields}
    known = {name: value for name, value in given.items() if name in fields}
    if unknown and collector is None:
        name = next(iter(unknown))
        listed = ", ".join(fields) or "none"
        raise UnknownOptionError(
            f"Format {owner!r} has no option {name!r}.{did_you_mean(name, fields)} "
            f"Its options: {listed}."
        )
    if unknown and collector is not None:
        known[collector.name] = {**known.get(collector.name, {}), **unknown}
    missing = [name for name, field in fields.items() if name not in known and _is_required(field)]
    if missing:
        raise ConfigError(f"Format {owner!r} needs {', '.join(f'{name}=...' for name in missing)}.")
    hints = _get_hints(options_type)
    for name, value in known.items():
        if name in hints and not _matches(value, hints[name]):
            # A field without repr is a secret.
            shown = repr(value) if fields[name].repr else f"a {type(value).__name__}"
            raise ConfigError(
                f"Format {owner!r}: {name} must be {_spell(hints[name])}, got {shown}."
            )
    return options_type(**known)


def describe_option_fields(options_type: type) -> list[OptionInfo]:
    """The options of a format, in order."""
    hints = _get_hints(options_type)
    described = []
    for field in dataclasses.fields(options_type):
        if field.init and not field.metadata.get(COLLECTS_UNKNOWN):
            if _is_required(field):
                default = None
            elif field.default_factory is not dataclasses.MISSING:
                default = repr(field.default_factory())
            else:
                default = repr(field.default)
            spelled = _spell(hints[field.name]) if field.name in hints else str(field.type)
            described.append(OptionInfo(field.name, spelled, default))
    return described


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _get_hints(options_type: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(options_type)
    # A stranger's annotations may name things that exist for type checkers only.
    except (NameError, AttributeError, TypeError):
        return {}


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation; annotations that are not understood always fit."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == item and type(value) is type(item) for item in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_matches(value, part) for part in get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return isinstance(value, str | os.PathLike)
    if isinstance(origin, type) and origin is not type and not isinstance(value, str):
        return isinstance(value, origin)
    return not isinstance(origin, type)


def _spell(hint: Any) -> str:
    """An annotation as a person would write it."""
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(repr(item) for item in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(part) for part in get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
