"""Folders that one process writes into, and that nobody misses when it dies.

Each is called ``.NAME.qlora_kit-XXXXXXXX.partial`` and locked by its process. The system gives the
lock up when the process ends, however it ends, so that the next run can tell what was left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qlora_kit.file_locks import HeldLock, is_locked, take_lock

__all__ = [
    "ADDED_BYTES",
    "PARTIAL",
    "PREVIOUS",
    "find_left",
    "is_abandoned",
    "locked_folder",
    "remove_abandoned",
    "scratch_folder",
]

logger = logging.getLogger(__name__)

#: A folder that is being written.
PARTIAL: Final = ".partial"
#: One that was moved aside while another takes its place.
PREVIOUS: Final = ".previous"
#: The file beside it that is locked: Windows locks no folders.
_LOCK: Final = ".lock"

_MARK: Final = ".qlora_kit-"
_MARKED: Final = re.compile(
    r"\.(?P<name>.+)\.qlora_kit-[0-9a-f]{8}(?P<kind>\.partial|\.previous|\.lock)"
)

#: Names are random: more than one lock that another has is hardly ever met.
_ATTEMPTS: Final = 20

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
            lock.release()


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A new folder among the system's temporary ones, which only this user may read.

    What dead processes left there, whatever for, is removed first: Python's own temporary folders
    stay for ever where a process is killed, and whole models among them fill a disk.

    Args:
        name: What for.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    with locked_folder(parent, name, 0o700) as folder:
        yield folder


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
    for file in _find_marked(parent, name, _LOCK):
        # Asking removes it, if nobody has it.
        is_locked(file)


def find_left(parent: Path, name: str | None, kind: str) -> list[Path]:
    """Real folders in ``parent`` that have such a name; links are nobody's leftovers.

    Args:
        parent: Where to look; it need not exist.
        name: What for; ``None`` for any.
        kind: :data:`PARTIAL` or :data:`PREVIOUS`.
    """
    return [
        path for path in _find_marked(parent, name, kind) if path.is_dir() and not path.is_symlink()
    ]


def _find_marked(parent: Path, name: str | None, kind: str) -> list[Path]:
    found = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            marked = _MARKED.fullmatch(entry.name)
            if marked is not None and marked["kind"] == kind and name in (None, marked["name"]):
                found.append(Path(entry.path))
    return sorted(found)


def is_abandoned(folder: Path) -> bool:
    """Whether no live process holds a folder's lock; where there are no locks, never."""
    return not is_locked(_lock_of(folder))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix(PARTIAL) + _LOCK)


def _make_locked_folder(parent: Path, name: str, mode: int) -> tuple[Path, HeldLock | None]:
    """A new folder, and a lock that the system drops when this process dies."""
    for _ in range(_ATTEMPTS):
        folder = parent / f".{name}{_MARK}{secrets.token_hex(4)}{PARTIAL}"
        # Locked before it is there: no other run can take it for a leftover.
        try:
            lock = take_lock(_lock_of(folder))
        except OSError as error:
            # A file system without locks just keeps its leftovers.
            logger.info("%s cannot be locked: %s", folder, error)
            folder.mkdir(mode)
            return folder, None
        # Else another run is just about to remove the lock's file, as one that nobody has.
        if lock is None:
            continue
        try:
            folder.mkdir(mode)
        except BaseException:
            lock.release()
            raise
        return folder, lock
    # Such as /proc, which has neither the file nor an error that says so.
    raise OSError(errno.EACCES, "No file can be made", str(parent))
