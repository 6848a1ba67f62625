"""One training at a time in an output folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from qlora_kit import ranks
from qlora_kit.errors import TrainingError
from qlora_kit.file_locks import take_lock

__all__ = ["check_unused", "hold_folder"]

logger = logging.getLogger(__name__)

LOCK_NAME: Final = ".qlora_kit_training.lock"
_HOLDER_NAME: Final = ".qlora_kit_training.json"

# The system's locks are a process's own; these are its threads'.
_held: set[Path] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def hold_folder(folder: Path, run_id: str) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made where there is none.

    The system gives the lock up when the process ends, however it ends.

    Args:
        folder: The output folder.
        run_id: The run, for whoever comes second.

    Raises:
        TrainingError: When another training that lives holds it; names its process.
    """
    if not ranks.is_main():
        # The ranks of one training share its folder, and the main one writes there.
        yield
        return
    was_there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    with _guard:
        if place in _held:
            raise TrainingError(_describe(folder, f"another thread of this process {os.getpid()}"))
        _held.add(place)
    try:
        with _locked_file(folder, run_id):
            yield
    finally:
        with _guard:
            _held.discard(place)
        if not was_there:
            # Only where nothing was written.
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_unused(folder: Path) -> None:
    """Refuse a folder that another training holds, now.

    Raises:
        TrainingError: When one does; names its process.
    """
    if ranks.is_main() and (folder / LOCK_NAME).is_file():
        with hold_folder(folder, ""):
            pass


@contextlib.contextmanager
def _locked_file(folder: Path, run_id: str) -> Iterator[None]:
    path = folder / LOCK_NAME
    try:
        lock = take_lock(path)
    except OSError as error:
        # Some network file systems have no locks.
        logger.info("%s cannot be locked against a second training: %s", folder, error)
        yield
        return
    if lock is None:
        raise TrainingError(_describe(folder, _read_holder(folder)))
    holder = {
        "process": os.getpid(),
        "host": platform.node(),
        "run": run_id,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # In a file of its own: Windows lets nobody else read a locked one.
    said = folder / _HOLDER_NAME
    try:
        with contextlib.suppress(OSError):
            said.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            said.unlink()
        lock.release()


def _read_holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER_NAME).read_text(encoding="utf-8"))
        return (
            f"process {holder['process']} on {holder['host']} (run {holder['run']}, since "
            f"{holder['since']})"
        )
    # It is being written, or its holder has just ended.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _describe(folder: Path, holder: str) -> str:
    return (
        f"output_dir={str(folder)!r} is in use: {holder} is training there. Wait for it to end, or "
        "give another output_dir: both would write the same checkpoints."
    )
