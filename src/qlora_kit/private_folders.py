"""Folders that one process writes into, and that nobody misses when it dies.

Each is called ``.NAME.qlora_kit-XXXXXXXX.partial`` and locked by its process. The system gives the
lock up when the process ends, however it ends, so that the next run can tell what was left.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = [
    "ADDED_BYTES",
    "PARTIAL",
    "PREVIOUS",
    "find_left",
    "is_abandoned",
    "locked_folder",
    "remove_abandoned",
]

logger = logging.getLogger(__name__)

#: Windows has none; see is_abandoned.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

#: A folder that is being written.
PARTIAL: Final = ".partial"
#: One that was moved aside while another takes its place.
PREVIOUS: Final = ".previous"

_MARK: Final = ".qlora_kit-"
_MARKED: Final = re.compile(r"\.(?P<name>.+)\.qlora_kit-[0-9a-f]{8}(?P<kind>\.partial|\.previous)")

#: Bytes that the name of such a folder has beside the one it is made from.
ADDED_BYTES: Final = len(f".{_MARK}12345678{PREVIOUS}")


@contextlib.contextmanager
def locked_folder(parent: Path, name: str, mode: int = 0o777) -> Iterator[Path]:
    """A new folder of this process, removed afterwards.

    Args:
        parent: Where; it exists.
        name: What for.
        mode: Who may read it; the umask takes away from it.
    """
    folder, lock = _make_locked_folder(parent, name, mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(parent: Path, name: str | None = None) -> None:
    """Remove what dead processes left in a folder.

    Args:
        parent: Where to look.
        name: What for; ``None`` for whatever was being written there.
    """
    for entry in find_left(parent, name, PARTIAL):
        if is_abandoned(entry):
            logger.info("Removing %s, left by a run that died.", entry)
            shutil.rmtree(entry, ignore_errors=True)


def find_left(parent: Path, name: str | None, kind: str) -> list[Path]:
    """Real folders in ``parent`` that have such a name; links are nobody's leftovers.

    Args:
        parent: Where to look; it need not exist.
        name: What for; ``None`` for any.
        kind: :data:`PARTIAL` or :data:`PREVIOUS`.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            marked = _MARKED.fullmatch(entry.name)
            if (
                marked is not None
                and marked["kind"] == kind
                and name in (None, marked["name"])
                and entry.is_dir(follow_symlinks=False)
            ):
                found.append(Path(entry.path))
    return sorted(found)


def is_abandoned(folder: Path) -> bool:
    """Whether no live process holds a folder's lock; without locks, never."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _make_locked_folder(parent: Path, name: str, mode: int) -> tuple[Path, int | None]:
    """A new folder, and a lock that the system drops when this process dies."""
    while True:
        folder = parent / f".{name}{_MARK}{secrets.token_hex(4)}{PARTIAL}"
        folder.mkdir(mode)
        if fcntl is None:
            return folder, None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another run takes it for a leftover and is about to remove it.
            os.close(handle)
            continue
        except OSError:
            # A file system without locks just keeps its leftovers.
            return folder, handle
        # Another run may have taken it for a leftover before it was locked.
        if folder.is_dir():
            return folder, handle
        os.close(handle)
