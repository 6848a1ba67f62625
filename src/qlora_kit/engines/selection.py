"""Choosing an engine once, and saying why."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.engines.base import Engine
from qlora_kit.engines.contract import find_missing
from qlora_kit.errors import ConfigError, MissingDependencyError, did_you_mean
from qlora_kit.messages import Setting
from qlora_kit.versions import warn_of_untested

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ENGINE_NAMES", "resolve_engine"]

logger = logging.getLogger(__name__)

ENGINE_NAMES = ("auto", "native", "unsloth")


def resolve_engine(engine: str | Engine = "auto", folder: Path | None = None) -> Engine:
    """Turn ``engine=`` into an engine, log the choice and its reason.

    Args:
        engine: ``"auto"`` takes native where it computes the model's training steps itself and
            wherever unsloth is missing or has no GPU that it supports, else unsloth; a name
            takes that engine or fails; an instance is used as it is.
        folder: The checkpoint to be loaded, whose ``config.json`` decides for ``"auto"``.

    Raises:
        ConfigError: When there is no engine of that name.
        MissingDependencyError: When unsloth was named and is not installed.
    """
    if not isinstance(engine, str):
        _check_engine(engine)
        logger.info("Engine %r: given as an instance.", engine.name)
        warn_of_untested()
        return engine
    if engine not in ENGINE_NAMES:
        raise ConfigError(
            f"There is no engine {engine!r}.{did_you_mean(engine, ENGINE_NAMES)} "
            f"Choose one of {', '.join(ENGINE_NAMES)}."
        )
    name, reason = (engine, "asked for by name") if engine != "auto" else _choose(folder)
    warn_of_untested("unsloth" if name == "unsloth" else "")
    made = _MAKERS[name]()
    logger.info("Engine %r: %s.", name, reason)
    if name == "native" and "unsloth" in sys.modules:
        logger.warning(
            "unsloth is already imported in this process and has patched transformers, trl and "
            "peft; the native engine runs on the patched libraries. Start a fresh process for "
            "unpatched ones."
        )
    return made


def _check_engine(engine: object) -> None:
    """Refuse an object that is no engine, naming what it lacks."""
    wanted = (
        f"engine must be one of {', '.join(ENGINE_NAMES)} or an object with the methods of "
        "qlora_kit.engines.base.Engine"
    )
    if isinstance(engine, type):
        raise ConfigError(
            f"{wanted}; got the class {engine.__name__}. Give an object: {engine.__name__}()."
        )
    missing = find_missing(engine, Engine)
    if missing:
        raise ConfigError(
            f"{wanted}; got {type(engine).__name__}, which lacks {', '.join(missing)}."
        )
    name = engine.name  # type: ignore[attr-defined]
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{wanted}; the name of this one must be text, got {name!r}.")


def _choose(folder: Path | None) -> tuple[str, str]:
    if importlib.util.find_spec("unsloth") is None:
        return "native", "unsloth is not installed"
    import torch

    if not torch.cuda.is_available():
        return "native", "no GPU that unsloth supports was found"
    capability = torch.cuda.get_device_capability()
    if capability < (7, 0):
        return "native", f"unsloth needs compute capability 7.0, this GPU has {capability}"
    obstacle = _find_obstacle(folder)
    if obstacle is None:
        return "native", "it computes this architecture's training steps itself"
    return "unsloth", (
        f"it is installed and supports {torch.cuda.get_device_name()}, and native would train "
        f"through TRL and peft: {obstacle}"
    )


def _find_obstacle(folder: Path | None) -> str | None:
    if folder is None:
        return "the architecture is not known"
    from qlora_kit.engines.native.layers.architectures import find_architecture_obstacle

    return find_architecture_obstacle(
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    )


def _make_native() -> Engine:
    from qlora_kit.engines.native.engine import NativeEngine

    return NativeEngine()


def _make_unsloth() -> Engine:
    if importlib.util.find_spec("unsloth") is None:
        raise MissingDependencyError(
            Setting("engine", "unsloth", "load_quantized"),
            " needs the unsloth package: pip install 'qlora-kit[unsloth]', or use ",
            Setting("engine", "native", "load_quantized"),
            ".",
            parameter="engine",
            value="unsloth",
        )
    from qlora_kit.engines.unsloth import UnslothEngine

    return UnslothEngine()


_MAKERS: dict[str, Callable[[], Engine]] = {"native": _make_native, "unsloth": _make_unsloth}
