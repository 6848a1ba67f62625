"""Turning keyword arguments into an exporter's options, and saying what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, Final, Literal, Union, get_args, get_origin

from qlora_kit.errors import ConfigError, QloraKitError, UnknownOptionError, did_you_mean
from qlora_kit.messages import Setting
from qlora_kit.values import is_number, is_whole_number

__all__ = [
    "COLLECTS_UNKNOWN",
    "OptionInfo",
    "build_options",
    "collects_unknown",
    "describe_option_fields",
]

#: Key in a field's metadata: keywords that are not fields of the dataclass go into this one.
COLLECTS_UNKNOWN: Final = "qlora_kit.collects_unknown"


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One option of a format, for showing to people.

    Attributes:
        name: The keyword.
        type: Its annotation as written.
        default: The default; ``"..."`` stands for one that is a secret.
        is_required: Whether the option must be given, and ``default`` means nothing.
        is_secret: Whether it is kept out of manifests and messages.
    """

    name: str
    type: str
    default: Any = None
    is_required: bool = False
    is_secret: bool = False


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
        needed: list[object] = []
        for name in missing:
            needed += [", " if needed else " ", Setting(name, ..., "export_model")]
        raise ConfigError(f"Format {owner!r} needs", *needed, ".", parameter=missing[0])
    hints = _get_hints(options_type)
    for name, value in known.items():
        if name in hints and not _matches(value, hints[name]):
            # A field without repr is a secret.
            shown = repr(value) if fields[name].repr else f"a {type(value).__name__}"
            raise ConfigError(
                f"Format {owner!r}: {name} must be {_spell(hints[name])}, got {shown}."
            )
    try:
        return options_type(
            **{name: _convert(value, hints.get(name, Any)) for name, value in known.items()}
        )
    except QloraKitError:
        raise
    except Exception as error:  # __post_init__ of a stranger's dataclass
        raise ConfigError(f"Format {owner!r}: {error}") from error


def collects_unknown(options_type: type) -> bool:
    """Whether a dataclass takes keywords that are not its fields."""
    return any(f.metadata.get(COLLECTS_UNKNOWN) for f in dataclasses.fields(options_type))


def describe_option_fields(options_type: type) -> list[OptionInfo]:
    """The options of a format, in order."""
    hints = _get_hints(options_type)
    described = []
    for field in dataclasses.fields(options_type):
        if field.init and not field.metadata.get(COLLECTS_UNKNOWN):
            default: Any = None
            if not field.repr and field.default is not None:
                default = "..."
            elif field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            elif field.default is not dataclasses.MISSING:
                default = field.default
            spelled = _spell(hints[field.name]) if field.name in hints else str(field.type)
            described.append(
                OptionInfo(field.name, spelled, default, _is_required(field), not field.repr)
            )
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
        return is_number(value)
    if hint is int:
        return is_whole_number(value)
    if hint in (str, bool):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return isinstance(value, str | os.PathLike)
    try:
        is_instance = isinstance(value, hint if origin is None else origin)
    except TypeError:  # Any, a TypedDict, a plain protocol
        return True
    kind = hint if origin is None else origin
    # JSON and command lines have lists only.
    if kind is tuple and isinstance(value, list):
        is_instance = True
    # A str is a sequence too, and never what a list of names means.
    if isinstance(value, str) and issubclass(kind, Iterable) and not issubclass(kind, str):
        return False
    return is_instance and _items_match(value, get_args(hint))


def _items_match(value: Any, parts: tuple[Any, ...]) -> bool:
    if not isinstance(value, Sequence | Set):
        return True
    if len(parts) == 1 or (len(parts) == 2 and parts[1] is Ellipsis):
        return all(_matches(item, parts[0]) for item in value)
    return True


def _convert(value: Any, hint: Any) -> Any:
    """A path given as text, and a tuple given as a list, as the annotation has them."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for part in parts:
        if isinstance(value, str) and isinstance(part, type) and issubclass(part, PurePath):
            return value if str in parts else part(value)
        if isinstance(value, list) and (part is tuple or get_origin(part) is tuple):
            return tuple(value)
    return value


def _spell(hint: Any) -> str:
    """An annotation as a person would write it."""
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(repr(item) for item in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(part) for part in get_args(hint))
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and origin is None:
        return hint.__name__
    return str(hint).replace("collections.abc.", "").replace("typing.", "")
