"""Installed plugins as their distributions name them: which there are, which are switched off.

Nothing is imported here.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from importlib import metadata
from typing import Final

from qlora_kit.hookspecs import PROJECT_NAME

__all__ = [
    "DISABLE_VARIABLE",
    "PLUGINS_VARIABLE",
    "BrokenPlugin",
    "Origin",
    "find_own_version",
    "find_plugins",
]

logger = logging.getLogger(__name__)

#: Any value but ``""``, ``"0"``, ``"false"``, ``"no"`` and ``"off"`` turns every third-party
#: plugin off, whatever the list below says.
DISABLE_VARIABLE: Final = "QLORA_KIT_DISABLE_PLUGINS"

#: The only plugins to load, by the names of their entry points or distributions, separated by
#: commas. Unset loads all; an empty value loads none.
PLUGINS_VARIABLE: Final = "QLORA_KIT_PLUGINS"

_FALSE: Final = ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Origin:
    """Where an exporter or a formatter comes from.

    Attributes:
        plugin: The entry point's name, or the module of a built-in.
        distribution: The installed distribution, or ``"this process"``.
        version: The distribution's version, where it has one.
    """

    plugin: str
    distribution: str
    version: str | None = None

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution}"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin, or one thing it registers, that cannot be used, and why."""

    origin: Origin
    reason: str
    error: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


def find_plugins() -> tuple[list[tuple[Origin, metadata.EntryPoint]], list[Origin]]:
    """The installed plugins to load, and those that an environment variable keeps out."""
    is_off = os.environ.get(DISABLE_VARIABLE, "").strip().lower() not in _FALSE
    listed = os.environ.get(PLUGINS_VARIABLE)
    chosen = None if listed is None else {part.strip() for part in listed.split(",")} - {""}
    unmatched = set(chosen or ())
    to_load: list[tuple[Origin, metadata.EntryPoint]] = []
    switched_off: list[Origin] = []
    for entry_point in metadata.entry_points(group=PROJECT_NAME):
        dist = entry_point.dist
        origin = (
            Origin(entry_point.name, dist.name, dist.version)
            if dist
            else Origin(entry_point.name, "an unknown distribution")
        )
        names = {origin.plugin, origin.distribution}
        unmatched -= names
        if is_off or not (chosen is None or names & chosen):
            switched_off.append(origin)
        else:
            to_load.append((origin, entry_point))
    if unmatched and not is_off:
        logger.warning(
            "%s lists %s, and no installed plugin or distribution is called that.",
            PLUGINS_VARIABLE, ", ".join(sorted(unmatched)),
        )  # fmt: skip
    return to_load, switched_off


def find_own_version() -> str | None:
    """The installed version of this library."""
    try:
        return metadata.version("qlora-kit")
    except metadata.PackageNotFoundError:
        return None
