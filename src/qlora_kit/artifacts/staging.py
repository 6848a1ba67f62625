"""A folder that appears whole or not at all.

Everything is written into a private folder beside the destination,
``.NAME.qlora_kit-XXXXXXXX.partial``, flushed to disk, and renamed. Replacing an existing
folder exchanges the two names in one step where the system can (Linux), and otherwise moves
the old one aside first, from where the next run brings it back if this one dies in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qlora_kit.artifacts.files import list_foreign
from qlora_kit.errors import DestinationExistsError, ExportError
from qlora_kit.messages import Setting
from qlora_kit.private_folders import (
    PARTIAL,
    PREVIOUS,
    find_left,
    is_abandoned,
    locked_folder,
    remove_abandoned,
)

__all__ = ["StagedFolder", "clean_leftovers", "stage_folder"]

logger = logging.getLogger(__name__)

# From linux/fcntl.h and linux/fs.h.
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class StagedFolder:
    """A folder being written, and how it takes its place.

    Attributes:
        folder: Where to write.
        destination: Where it will stand.
        is_committed: Whether it stands there.
    """

    def __init__(self, folder: Path, destination: Path, *, overwrite: bool) -> None:
        self.folder = folder
        self.destination = destination
        self.is_committed = False
        self._overwrite = overwrite

    def commit(self) -> None:
        """Flush everything to disk and take the destination's name.

        Raises:
            DestinationExistsError: When files appeared there meanwhile and ``overwrite`` is off.
        """
        flush_tree(self.folder)
        parent = self.destination.parent
        if self._overwrite and self.destination.exists():
            if foreign := list_foreign(self.destination):
                raise DestinationExistsError(
                    f"{self.destination} was filled by something else during the export: "
                    f"{', '.join(foreign[:3])}. Give another path, or take that away."
                )
            _replace(self.folder, self.destination)
        else:
            try:
                # Onto an empty folder this is as atomic as onto nothing (rename(2)).
                if os.name == "nt" and self.destination.is_dir():
                    self.destination.rmdir()
                os.rename(self.folder, self.destination)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise DestinationExistsError(
                    f"{self.destination} was filled by something else during the export.",
                    advice=(
                        "Give another path, or ",
                        Setting("overwrite", True, "export_model"),
                        ".",
                    ),
                ) from error
        self.is_committed = True
        _flush_folder(parent)


@contextlib.contextmanager
def stage_folder(destination: Path, *, overwrite: bool = False) -> Iterator[StagedFolder]:
    """A staging folder beside ``destination``; removed on exit unless it was committed.

    Args:
        destination: Where the finished folder will stand. Its parent is made if missing.
        overwrite: Whether an existing folder may be replaced.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(destination)
    # After an exchange this name holds the folder that was replaced, and is removed all the same.
    with locked_folder(destination.parent, destination.name) as folder:
        yield StagedFolder(folder, destination, overwrite=overwrite)


def clean_leftovers(destination: Path) -> None:
    """Remove what dead runs left beside a destination; bring back an export they had moved."""
    parent, name = destination.parent, destination.name
    for moved in find_left(parent, name, PREVIOUS):
        partner = moved.with_name(moved.name.removesuffix(PREVIOUS) + PARTIAL)
        if partner.is_dir() and not is_abandoned(partner):
            continue
        # What a run moves aside is an export, or empty. Anything else is somebody's, and stays.
        if list_foreign(moved):
            logger.warning("%s is no export, whatever its name says; it is left alone.", moved)
        elif destination.exists():
            shutil.rmtree(moved, ignore_errors=True)
        else:
            logger.warning("Bringing back %s, which a run that died had moved.", destination)
            os.rename(moved, destination)
    remove_abandoned(parent, name)


def flush_tree(folder: Path) -> None:
    """Fsync every file and folder below ``folder``, and it."""
    for root, _, files in os.walk(folder):
        for file in files:
            # Windows flushes only what is open for writing.
            mode = os.O_RDWR if os.name == "nt" else os.O_RDONLY
            handle = os.open(os.path.join(root, file), mode)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(folder: Path, destination: Path) -> None:
    if _exchange(folder, destination):
        return
    previous = folder.with_name(folder.name.removesuffix(PARTIAL) + PREVIOUS)
    os.rename(destination, previous)
    try:
        os.rename(folder, destination)
    except OSError:
        os.rename(previous, destination)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step with renameat2(2); whether the system could."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # musl, and glibc before 2.28
        return False
    result = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise ExportError(
        f"{second} could not be replaced: {os.strerror(number)}. It is as it was before."
    ) from OSError(number, os.strerror(number), str(second))
