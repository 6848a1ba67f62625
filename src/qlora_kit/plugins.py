"""Finding exporters: built-ins by dotted name, other people's by entry point.

A plugin that cannot be imported, or that registers something that is not an exporter, is
reported by name and the rest keep working.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, Final

import pluggy

from qlora_kit import hookspecs
from qlora_kit.errors import ConfigError, PluginError, QloraKitError, did_you_mean
from qlora_kit.hookspecs import PROJECT_NAME, Exporter, describe_exporter_faults

__all__ = [
    "BUILTINS",
    "DISABLE_VARIABLE",
    "PLUGINS_VARIABLE",
    "BrokenPlugin",
    "ExporterRegistry",
    "Origin",
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

#: Any value but ``""``, ``"0"``, ``"false"``, ``"no"`` and ``"off"`` turns every third-party
#: plugin off, whatever the list below says.
DISABLE_VARIABLE: Final = "QLORA_KIT_DISABLE_PLUGINS"

#: The only plugins to load, by the names of their entry points or distributions, separated by
#: commas. Unset loads all; an empty value loads none.
PLUGINS_VARIABLE: Final = "QLORA_KIT_PLUGINS"

_THIS_PROCESS: Final = "this process"
_FALSE: Final = ("", "0", "false", "no", "off")
_HOOK: Final = "qlora_kit_register_exporters"


@dataclass(frozen=True)
class Origin:
    """Where an exporter comes from.

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
    """A plugin, or one exporter of it, that cannot be used, and why."""

    origin: Origin
    reason: str
    error: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True)
class _Registered:
    exporter: Exporter
    origin: Origin
    is_builtin: bool


class ExporterRegistry:
    """The exporters of this process, each plugin asked for them once.

    Args:
        builtins: Dotted names of modules with hook implementations, registered first.
        use_entry_points: Whether to look for installed plugins.

    Attributes:
        broken: What could not be used.
        switched_off: Installed plugins that an environment variable keeps out.
    """

    def __init__(
        self, builtins: Iterable[str] = BUILTINS, *, use_entry_points: bool = True
    ) -> None:
        self.broken: list[BrokenPlugin] = []
        self.switched_off: list[Origin] = []
        # More than one of a name means that two plugins claim it and neither gets it.
        self._claims: dict[str, list[_Registered]] = {}
        self._manager = pluggy.PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(hookspecs)
        for dotted in builtins:
            origin = Origin(dotted, "qlora-kit", _find_own_version())
            self._add(origin, partial(importlib.import_module, dotted), is_builtin=True)
        if use_entry_points:
            self._add_entry_points()

    def names(self) -> list[str]:
        """Names of every usable exporter, sorted."""
        return sorted(name for name, claims in self._claims.items() if len(claims) == 1)

    def get(self, name: str) -> Exporter:
        """The exporter of that name.

        Raises:
            ConfigError: When no exporter has that name; names the nearest ones, and broken plugins.
            PluginError: When two plugins claim the name.
        """
        return self._find(name).exporter

    def get_origin(self, name: str) -> Origin:
        """Where an exporter comes from; raises as :meth:`get` does."""
        return self._find(name).origin

    def register(self, plugin: object, name: str | None = None) -> str:
        """Add a plugin object by hand, as a notebook or test would.

        Args:
            plugin: A module or object with the hook.
            name: What to call it; by default its own name.

        Returns:
            The name, for :meth:`unregister`.

        Raises:
            PluginError: When it cannot be used; nothing is changed then.
        """
        origin = Origin(
            name or str(getattr(plugin, "__name__", type(plugin).__name__)), _THIS_PROCESS
        )
        before = len(self.broken)
        claims = {name: list(claims) for name, claims in self._claims.items()}
        self._add(origin, lambda: plugin)
        if len(self.broken) > before:
            reasons = "; ".join(str(broken) for broken in self.broken[before:])
            del self.broken[before:]
            self._claims = claims
            if self._manager.get_plugin(str(origin)) is plugin:
                self._manager.unregister(name=str(origin))
            raise PluginError(f"Cannot register {reasons}")
        return origin.plugin

    def unregister(self, name: str) -> None:
        """Remove a plugin added with :meth:`register`."""
        origin = Origin(name, _THIS_PROCESS)
        self._manager.unregister(name=str(origin))
        for exporter_name, claims in list(self._claims.items()):
            kept = [claim for claim in claims if claim.origin != origin]
            if kept:
                self._claims[exporter_name] = kept
            else:
                del self._claims[exporter_name]

    def _find(self, name: str) -> _Registered:
        claims = self._claims.get(name, [])
        if len(claims) > 1:
            raise PluginError(
                f"Two exporters are named {name!r}: {' and '.join(str(c.origin) for c in claims)}. "
                f"Uninstall one, or name the plugins to load in {PLUGINS_VARIABLE}."
            )
        if not claims:
            names = self.names()
            aside = [f"\n  not usable: {broken}" for broken in self.broken]
            aside += [f"\n  switched off: {origin}" for origin in self.switched_off]
            raise ConfigError(
                f"There is no exporter named {name!r}.{did_you_mean(str(name), names)} "
                f"Available: {', '.join(names)}.{''.join(aside)}"
            )
        return claims[0]

    def _add_entry_points(self) -> None:
        is_off = os.environ.get(DISABLE_VARIABLE, "").strip().lower() not in _FALSE
        listed = os.environ.get(PLUGINS_VARIABLE)
        chosen = None if listed is None else {part.strip() for part in listed.split(",")} - {""}
        unmatched = set(chosen or ())
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
                self.switched_off.append(origin)
            else:
                self._add(origin, entry_point.load)
        if unmatched and not is_off:
            logger.warning(
                "%s lists %s, and no installed plugin or distribution is called that.",
                PLUGINS_VARIABLE, ", ".join(sorted(unmatched)),
            )  # fmt: skip

    def _add(self, origin: Origin, load: Callable[[], Any], *, is_builtin: bool = False) -> None:
        try:
            exporters = self._ask(origin, load())
        # Whatever a stranger's module raises, even sys.exit(), its neighbours keep working.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            named = "" if isinstance(error, QloraKitError) else f"{type(error).__name__}: "
            self._report(BrokenPlugin(origin, " ".join(f"{named}{error}".split()), error))
            return
        for exporter in exporters:
            faults = describe_exporter_faults(exporter)
            if faults:
                shown = f"exporter {type(exporter).__name__} {'; '.join(faults)}"
                self._report(BrokenPlugin(origin, shown))
            else:
                self._claim(_Registered(exporter, origin, is_builtin))

    def _ask(self, origin: Origin, plugin: Any) -> list[Any]:
        """Register a plugin and call its hook."""
        # Not the entry point's name alone: two distributions may use the same one.
        key = str(origin)
        self._manager.register(plugin, name=key)
        try:
            self._manager.check_pending()
            hook = self._manager.hook.qlora_kit_register_exporters
            mine = [i.function for i in hook.get_hookimpls() if i.plugin_name == key]
            if not mine:
                raise PluginError(_explain_no_hook(plugin))
            made = mine[0]()
            if isinstance(made, str | bytes) or not isinstance(made, Iterable):
                raise PluginError(
                    f"{_HOOK}() returned {type(made).__name__}, not a list of exporters"
                )
            return list(made)
        except BaseException:
            self._manager.unregister(name=key)
            raise

    def _claim(self, new: _Registered) -> None:
        name = new.exporter.name
        others = self._claims.setdefault(name, [])
        if others:
            end = "which stays" if others[0].is_builtin else "and neither can be used"
            reason = f"exporter {name!r} has the name of one from {others[0].origin}, {end}"
            self._report(BrokenPlugin(new.origin, reason))
            if others[0].is_builtin:
                return
        others.append(new)

    def _report(self, broken: BrokenPlugin) -> None:
        self.broken.append(broken)
        logger.warning("Skipping %s", broken)
        logger.debug("%s", broken.origin, exc_info=broken.error)


def _explain_no_hook(plugin: Any) -> str:
    if callable(getattr(plugin, _HOOK, None)):
        return f"{_HOOK} is not marked with @qlora_kit.hookimpl"
    return (
        f"it has no {_HOOK}(); the entry point names the module (or object) that the hook is in, "
        f"and this one names a {type(plugin).__name__}"
    )


def _find_own_version() -> str | None:
    try:
        return metadata.version("qlora-kit")
    except metadata.PackageNotFoundError:
        return None


_lock = threading.RLock()
_registry: dict[str, ExporterRegistry | None] = {}


def get_registry() -> ExporterRegistry:
    """The registry of this process, made on first use.

    Raises:
        PluginError: When a plugin asks for the exporters while they are being found.
    """
    with _lock:
        if "default" not in _registry:
            _registry["default"] = None
            try:
                _registry["default"] = ExporterRegistry()
            finally:
                if _registry["default"] is None:
                    del _registry["default"]
        found = _registry["default"]
        if found is None:
            raise PluginError(
                "The list of exporters was asked for while it was being made: a plugin must not "
                "call available_exporters() or export_model() when it is imported."
            )
        return found
