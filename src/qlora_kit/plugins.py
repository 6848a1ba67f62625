"""Finding exporters: built-ins by dotted name, other people's by entry point.

A plugin that cannot be imported, or that registers something that is not an exporter,
is reported by name and the rest keep working. This module knows plugins. It does not
know what an export is.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from importlib import metadata
from typing import Any, Final

import pluggy

from qlora_kit import hookspecs
from qlora_kit.errors import ConfigError, PluginError, did_you_mean
from qlora_kit.hookspecs import PROJECT_NAME, Exporter

__all__ = [
    "BUILTINS",
    "PLUGINS_VARIABLE",
    "BrokenPlugin",
    "ExporterRegistry",
    "describe_exporter_faults",
    "get_registry",
]

logger = logging.getLogger(__name__)

#: Modules that register the built-in exporters through the public hook.
BUILTINS: Final = (
    "qlora_kit.exporters.lora",
    "qlora_kit.exporters.merged_16bit",
    "qlora_kit.exporters.merged_4bit",
    "qlora_kit.exporters.gguf",
    "qlora_kit.exporters.hub",
)

#: ``""`` or ``"0"`` loads no third-party plugin; entry-point names separated by commas load
#: only those. Unset loads all.
PLUGINS_VARIABLE: Final = "QLORA_KIT_PLUGINS"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why."""

    name: str
    distribution: str
    reason: str
    error: BaseException | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution}: {self.reason}"


@dataclass(frozen=True)
class _Registered:
    exporter: Exporter
    plugin: str
    distribution: str


class ExporterRegistry:
    """The exporters of this process, found once.

    Args:
        builtins: Dotted names of modules with hook implementations, registered first.
        use_entry_points: Whether to look for installed plugins.
    """

    def __init__(
        self, builtins: Iterable[str] = BUILTINS, *, use_entry_points: bool = True
    ) -> None:
        self.broken: list[BrokenPlugin] = []
        self._distribution_of: dict[str, str] = {}
        self._manager = pluggy.PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(hookspecs)
        for dotted in builtins:
            self._add_plugin(dotted, "qlora-kit", partial(importlib.import_module, dotted))
        if use_entry_points:
            self._add_entry_points()
        self._exporters = self._collect()

    def names(self) -> list[str]:
        """Names of every usable exporter, sorted."""
        return sorted(self._exporters)

    def get(self, name: str) -> Exporter:
        """The exporter of that name.

        Raises:
            ConfigError: When there is none; names the nearest ones, and broken plugins.
        """
        if name in self._exporters:
            return self._exporters[name].exporter
        broken = "".join(f"\n  not available: {plugin}" for plugin in self.broken)
        raise ConfigError(
            f"There is no exporter named {name!r}.{did_you_mean(str(name), self._exporters)} "
            f"Available: {', '.join(self.names())}.{broken}"
        )

    def origin(self, name: str) -> str:
        """The distribution that an exporter came from."""
        return self._exporters[name].distribution

    def describe_origin(self, name: str) -> str:
        """The plugin and distribution of an exporter, for messages."""
        found = self._exporters[name]
        return f"plugin {found.plugin!r} of {found.distribution}"

    def register(self, plugin: object, name: str | None = None) -> str:
        """Add a plugin object by hand, as a notebook or test would, and collect its exporters.

        Raises:
            PluginError: When it cannot be used; nothing is changed then.
        """
        before = len(self.broken)
        plugin_name = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        self._add_plugin(plugin_name, "this process", lambda: plugin)
        if len(self.broken) > before:
            raise PluginError(str(self.broken.pop()))
        try:
            exporters = self._collect()
        except PluginError:
            self._manager.unregister(name=plugin_name)
            raise
        if len(self.broken) > before:
            self._manager.unregister(name=plugin_name)
            raise PluginError(str(self.broken.pop()))
        self._exporters = exporters
        return plugin_name

    def unregister(self, name: str) -> None:
        """Remove a plugin added with :meth:`register`."""
        self._manager.unregister(name=name)
        self._exporters = self._collect()

    def _add_entry_points(self) -> None:
        wanted = os.environ.get(PLUGINS_VARIABLE)
        chosen = (
            None if wanted is None else {part.strip() for part in wanted.split(",")} - {"", "0"}
        )
        for entry_point in metadata.entry_points(group=PROJECT_NAME):
            if chosen is not None and entry_point.name not in chosen:
                continue
            distribution = entry_point.dist.name if entry_point.dist else "an unknown distribution"
            self._add_plugin(entry_point.name, distribution, entry_point.load)

    def _add_plugin(self, name: str, distribution: str, load: Callable[[], Any]) -> None:
        try:
            plugin = load()
            self._manager.register(plugin, name=name)
            self._distribution_of[name] = distribution
            self._manager.check_pending()
        # Whatever a stranger's module raises at import, its neighbours must keep working.
        except Exception as error:  # noqa: BLE001
            if self._manager.has_plugin(name) and name in self._distribution_of:
                self._manager.unregister(name=name)
            self._report(name, distribution, f"{type(error).__name__}: {error}", error)

    def _collect(self) -> dict[str, _Registered]:
        found: dict[str, _Registered] = {}
        for implementation in self._manager.hook.qlora_kit_register_exporters.get_hookimpls():
            name = implementation.plugin_name
            distribution = self._distribution_of[name]
            try:
                made: Any = implementation.function()
                exporters = list(made or ())
            except Exception as error:  # noqa: BLE001 - see _add_plugin
                self._report(name, distribution, f"{type(error).__name__}: {error}", error)
                continue
            for exporter in exporters:
                faults = describe_exporter_faults(exporter)
                if faults:
                    self._report(name, distribution, f"{exporter!r} {'; '.join(faults)}", None)
                    continue
                if exporter.name in found:
                    other = found[exporter.name]
                    raise PluginError(
                        f"Two exporters are named {exporter.name!r}: plugin {other.plugin!r} of "
                        f"{other.distribution} and plugin {name!r} of {distribution}. Uninstall "
                        f"one, or choose with the environment variable {PLUGINS_VARIABLE}."
                    )
                found[exporter.name] = _Registered(exporter, name, distribution)
        return found

    def _report(
        self, name: str, distribution: str, reason: str, error: BaseException | None
    ) -> None:
        broken = BrokenPlugin(name, distribution, reason, error)
        if all(str(known) != str(broken) for known in self.broken):
            self.broken.append(broken)
            logger.warning("Skipping %s", broken)


def describe_exporter_faults(exporter: object) -> list[str]:
    """What keeps an object from being an exporter, one phrase each; empty when nothing does."""
    faults = []
    name = getattr(exporter, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        faults.append(f"has no usable name (got {name!r}; lower case, digits, '_' and '-')")
    if not isinstance(getattr(exporter, "summary", None), str):
        faults.append("has no summary")
    options_type = getattr(exporter, "options_type", None)
    if not (isinstance(options_type, type) and is_dataclass(options_type)):
        faults.append("has no options_type that is a dataclass")
    faults.extend(
        f"has no method {method}()"
        for method in ("check", "write", "verify")
        if not callable(getattr(exporter, method, None))
    )
    return faults


_lock = threading.Lock()
_registry: dict[str, ExporterRegistry] = {}


def get_registry() -> ExporterRegistry:
    """The registry of this process, made on first use.

    Raises:
        PluginError: When two plugins register exporters of one name.
    """
    with _lock:
        if "default" not in _registry:
            _registry["default"] = ExporterRegistry()
        return _registry["default"]
