"""Finding exporters and formatters: built-ins by dotted name, other people's by entry point.

A plugin that cannot be imported, or that registers something that is not what its hook is
for, is reported by name and the rest keep working.
"""

from __future__ import annotations

import importlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Generic, TypeVar

import pluggy

from qlora_kit import hookspecs
from qlora_kit.entry_points import (
    DISABLE_VARIABLE,
    PLUGINS_VARIABLE,
    BrokenPlugin,
    Origin,
    find_own_version,
    find_plugins,
)
from qlora_kit.errors import ConfigError, PluginError, QloraKitError, did_you_mean
from qlora_kit.hookspecs import (
    PROJECT_NAME,
    Exporter,
    FormatterKind,
    describe_exporter_faults,
    describe_formatter_faults,
)

__all__ = [
    "BUILTINS",
    "BUILTIN_FORMATTERS",
    "DISABLE_VARIABLE",
    "PLUGINS_VARIABLE",
    "BrokenPlugin",
    "ExporterRegistry",
    "FormatterRegistry",
    "Origin",
    "PluginRegistry",
    "get_formatter_registry",
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

#: The same for formatters.
BUILTIN_FORMATTERS: Final = (
    "qlora_kit.data.formatters.alpaca",
    "qlora_kit.data.formatters.chat",
    "qlora_kit.data.formatters.text",
)

_THIS_PROCESS: Final = "this process"
_HOOKS: Final = ("qlora_kit_register_exporters", "qlora_kit_register_formatters")

Thing = TypeVar("Thing", Exporter, FormatterKind)


@dataclass(frozen=True)
class _Registered(Generic[Thing]):
    thing: Thing
    origin: Origin
    is_builtin: bool


class PluginRegistry(ABC, Generic[Thing]):
    """The things of one kind in this process, each plugin asked for them once.

    Args:
        builtins: Dotted names of modules with hook implementations, registered first; the kind's
            own by default.
        use_entry_points: Whether to look for installed plugins.
        said: What was broken elsewhere already and needs no second warning.

    Attributes:
        broken: What could not be used.
        switched_off: Installed plugins that an environment variable keeps out.
    """

    #: The hook that plugins implement, what it returns one of, and the modules of the built-ins.
    hook: ClassVar[str]
    noun: ClassVar[str]
    builtins: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        builtins: Iterable[str] | None = None,
        *,
        use_entry_points: bool = True,
        said: Collection[BrokenPlugin] = (),
    ) -> None:
        self.broken: list[BrokenPlugin] = []
        self.switched_off: list[Origin] = []
        self._said = said
        # More than one of a name means that two plugins claim it and neither gets it.
        self._claims: dict[str, list[_Registered[Thing]]] = {}
        self._manager = pluggy.PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(hookspecs)
        for dotted in self.builtins if builtins is None else builtins:
            origin = Origin(dotted, "qlora-kit", find_own_version())
            self._add(origin, partial(importlib.import_module, dotted), is_builtin=True)
        if use_entry_points:
            to_load, self.switched_off = find_plugins()
            for origin, entry_point in to_load:
                self._add(origin, entry_point.load)

    @abstractmethod
    def describe_faults(self, thing: Any) -> list[str]:
        """What keeps an object from being of this kind, one phrase each."""

    def names(self) -> list[str]:
        """Names of everything usable, sorted."""
        return sorted(name for name, claims in self._claims.items() if len(claims) == 1)

    def claims(self, name: str) -> bool:
        """Whether anything has that name, usable or not."""
        return bool(self._claims.get(name))

    def get(self, name: str) -> Thing:
        """What has that name.

        Raises:
            ConfigError: When nothing has that name; names the nearest ones, and broken plugins.
            PluginError: When two plugins claim the name.
        """
        return self._find(name).thing

    def get_origin(self, name: str) -> Origin:
        """Where it comes from; raises as :meth:`get` does."""
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
        self._add(origin, lambda: plugin, may_lack_hook=False)
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
        for thing_name, claims in list(self._claims.items()):
            kept = [claim for claim in claims if claim.origin != origin]
            if kept:
                self._claims[thing_name] = kept
            else:
                del self._claims[thing_name]

    def describe_absent(self) -> str:
        """Lines on what may be why something is not there: broken plugins, and those kept out."""
        aside = [f"\n  not usable: {broken}" for broken in self.broken]
        aside += [f"\n  switched off: {origin}" for origin in self.switched_off]
        return "".join(aside)

    def _find(self, name: str) -> _Registered[Thing]:
        claims = self._claims.get(name, [])
        if len(claims) > 1:
            raise PluginError(
                f"Two {self.noun}s are named {name!r}: "
                f"{' and '.join(str(c.origin) for c in claims)}. "
                f"Uninstall one, or name the plugins to load in {PLUGINS_VARIABLE}."
            )
        if not claims:
            names = self.names()
            raise ConfigError(
                f"There is no {self.noun} named {name!r}.{did_you_mean(str(name), names)} "
                f"Available: {', '.join(names)}.{self.describe_absent()}"
            )
        return claims[0]

    def _add(
        self,
        origin: Origin,
        load: Callable[[], Any],
        *,
        is_builtin: bool = False,
        may_lack_hook: bool = True,
    ) -> None:
        try:
            things = self._ask(origin, load(), may_lack_hook=may_lack_hook)
        # Whatever a stranger's module raises, even sys.exit(), its neighbours keep working.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            named = "" if isinstance(error, QloraKitError) else f"{type(error).__name__}: "
            self._report(BrokenPlugin(origin, " ".join(f"{named}{error}".split()), error))
            return
        for thing in things:
            faults = self.describe_faults(thing)
            if faults:
                kind = thing if isinstance(thing, type) else type(thing)
                shown = f"{self.noun} {kind.__name__} {'; '.join(faults)}"
                self._report(BrokenPlugin(origin, shown))
            else:
                self._claim(_Registered(thing, origin, is_builtin))

    def _ask(self, origin: Origin, plugin: Any, *, may_lack_hook: bool) -> list[Any]:
        """Register a plugin and call its hook."""
        # Not the entry point's name alone: two distributions may use the same one.
        key = str(origin)
        self._manager.register(plugin, name=key)
        try:
            self._manager.check_pending()
            hooks = {name: self._find_hook(name, key) for name in _HOOKS}
            mine = hooks[self.hook]
            if mine is None:
                unmarked = callable(getattr(plugin, self.hook, None))
                if may_lack_hook and not unmarked and any(hooks.values()):
                    return []
                raise PluginError(self._explain_no_hook(plugin))
            made = mine()
            if isinstance(made, str | bytes) or not isinstance(made, Iterable):
                raise PluginError(
                    f"{self.hook}() returned {type(made).__name__}, not a list of {self.noun}s"
                )
            return list(made)
        except BaseException:
            self._manager.unregister(name=key)
            raise

    def _find_hook(self, name: str, key: str) -> Callable[[], Any] | None:
        hook: pluggy.HookCaller = getattr(self._manager.hook, name)
        mine = [i.function for i in hook.get_hookimpls() if i.plugin_name == key]
        return mine[0] if mine else None

    def _explain_no_hook(self, plugin: Any) -> str:
        if callable(getattr(plugin, self.hook, None)):
            return f"{self.hook} is not marked with @qlora_kit.hookimpl"
        return (
            f"it has no {self.hook}(); the entry point names the module (or object) that the hook "
            f"is in, and this one names a {type(plugin).__name__}"
        )

    def _claim(self, new: _Registered[Thing]) -> None:
        name = new.thing.name
        others = self._claims.setdefault(name, [])
        if others:
            end = "which stays" if others[0].is_builtin else "and neither can be used"
            reason = f"{self.noun} {name!r} has the name of one from {others[0].origin}, {end}"
            self._report(BrokenPlugin(new.origin, reason))
            if others[0].is_builtin:
                return
        others.append(new)

    def _report(self, broken: BrokenPlugin) -> None:
        self.broken.append(broken)
        if broken not in self._said:
            logger.warning("Skipping %s", broken)
        logger.debug("%s", broken.origin, exc_info=broken.error)


class ExporterRegistry(PluginRegistry[Exporter]):
    """The exporters of this process."""

    hook = "qlora_kit_register_exporters"
    noun = "exporter"
    builtins = BUILTINS

    def describe_faults(self, thing: Any) -> list[str]:
        """What keeps an object from being an exporter."""
        return describe_exporter_faults(thing)


class FormatterRegistry(PluginRegistry[FormatterKind]):
    """The classes of formatters of this process, by the kind that their specs state."""

    hook = "qlora_kit_register_formatters"
    noun = "formatter"
    builtins = BUILTIN_FORMATTERS

    def describe_faults(self, thing: Any) -> list[str]:
        """What keeps an object from being a formatter's class."""
        return describe_formatter_faults(thing)


_lock = threading.RLock()
#: ``"default"`` and ``"formatters"``; ``None`` while one is being made.
_registry: dict[str, Any] = {}


def get_registry() -> ExporterRegistry:
    """The exporters of this process, found on first use.

    Raises:
        PluginError: When a plugin asks for the exporters while they are being found.
    """
    registry: ExporterRegistry = _get("default", ExporterRegistry)
    return registry


def get_formatter_registry() -> FormatterRegistry:
    """The classes of formatters of this process, found on first use.

    Raises:
        PluginError: When a plugin asks for them while they are being found.
    """
    registry: FormatterRegistry = _get("formatters", FormatterRegistry)
    return registry


def _get(key: str, kind: type[ExporterRegistry] | type[FormatterRegistry]) -> Any:
    with _lock:
        if key not in _registry:
            said = [broken for made in _registry.values() if made for broken in made.broken]
            _registry[key] = None
            try:
                _registry[key] = kind(said=said)
            finally:
                if _registry[key] is None:
                    del _registry[key]
        found = _registry[key]
        if found is None:
            raise PluginError(
                f"The list of {kind.noun}s was asked for while it was being made: a plugin must "
                "not call available_exporters(), export_model() or formatter_from_spec() when it "
                "is imported."
            )
        return found
