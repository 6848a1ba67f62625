"""Finding exporters: built-ins by dotted name, other people's by entry point.

A plugin that cannot be imported is remembered by name and reported; the rest keep
working. This module knows plugins. It does not know what an export is.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Final

import pluggy

from qlora_kit import hookspecs
from qlora_kit.errors import ConfigError, PluginError, did_you_mean
from qlora_kit.hookspecs import PROJECT_NAME, Exporter

__all__ = ["BUILTINS", "DISABLE_VARIABLE", "BrokenPlugin", "ExporterRegistry", "registry"]

logger = logging.getLogger(__name__)

#: Modules that register the built-in exporters through the public hook.
BUILTINS: Final = (
    "qlora_kit.exporters.lora",
    "qlora_kit.exporters.merged_16bit",
)

#: Set to ``1`` to load no third-party plugin, or to names separated by commas to load those only.
DISABLE_VARIABLE: Final = "QLORA_KIT_LOAD_PLUGINS"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why."""

    name: str
    distribution: str
    reason: str
    error: BaseException = field(repr=False)


@dataclass(frozen=True)
class _Origin:
    plugin: str
    distribution: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution}"
