"""Locks on files that a process has until it ends, however it ends; on every system.

filelock knows what each system offers. What is added is that the file is removed with its lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["HeldLock", "holding_lock", "is_locked", "take_lock"]

logger = logging.getLogger(__name__)

_POLL: Final = 0.2


class HeldLock:
    """A lock that this process has."""

    def __init__(self, lock: BaseFileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        """Give it up and remove its file."""
        path = Path(self._lock.lock_file)
        # While it is locked: whoever waits for it then finds another file, or none. Windows
        # removes no file that is open.
        if os.name != "nt":
            path.unlink(missing_ok=True)
        self._lock.release()
        if os.name == "nt":
            with contextlib.suppress(OSError):
                path.unlink()


def take_lock(path: Path) -> HeldLock | None:
    """The lock on a file, which is made; ``None`` while another has it.

    Raises:
        OSError: Where files cannot be locked, as on some network file systems.
    """
    from filelock import FileLock, Timeout

    # It may be given up by another thread than took it.
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    # What older versions of filelock raise where there are no locks.
    except NotImplementedError as error:
        raise OSError(str(error)) from error
    return HeldLock(lock)


@contextlib.contextmanager
def holding_lock(path: Path, what: str) -> Iterator[None]:
    """Have the lock on a file meanwhile, after whoever has it now; without it where none is kept.

    Args:
        path: The file, which is made, and removed afterwards.
        what: What it is for, should this process have to wait.
    """
    lock = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
        if lock is None:
            logger.info("Another process is at %s; waiting for it.", what)
        while lock is None:
            time.sleep(_POLL)
            lock = take_lock(path)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def is_locked(path: Path) -> bool:
    """Whether a live process has the lock; also where that cannot be known."""
    try:
        lock = take_lock(path)
    except OSError:
        return True
    if lock is None:
        return True
    lock.release()
    return False
