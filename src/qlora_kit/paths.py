"""Where files are kept, and what lies near a path that does not exist."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_kit.errors import did_you_mean

__all__ = ["CACHE_VARIABLE", "describe_nearest", "get_cache_folder"]

#: Where files that are made once and kept go, instead of ``~/.cache/qlora_kit``.
CACHE_VARIABLE = "QLORA_KIT_CACHE"


def get_cache_folder(chosen: str | None = None) -> Path:
    """The folder for files that are made once and kept.

    Args:
        chosen: A folder that was asked for; it goes before the environment's.
    """
    chosen = chosen or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qlora_kit"


def describe_nearest(path: Path) -> str:
    """A hint with existing names near a path that does not exist."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    if not parent.is_dir():
        return ""
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    hint = did_you_mean(path.name, names)
    return hint or (f" {parent.absolute()} holds: {', '.join(names[:8])}." if names else "")
