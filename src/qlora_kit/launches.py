"""What the processes that one launcher started on a machine need once.

They share no connection yet when they load a model, and a script may load in one of them alone. So
whoever comes first does the work and leaves the answer in a file; the others wait for its lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Final

from qlora_kit.file_locks import holding_lock
from qlora_kit.paths import get_cache_folder
from qlora_kit.ranks import find_place

__all__ = ["once_a_machine", "stamp_paths"]

_calls: Final[Counter[str]] = Counter()


def once_a_machine(name: str, about: object, make: Callable[[], str]) -> str:
    """What ``make`` returns in the first process of this machine to ask.

    A process that is alone, and every process whose cache cannot be written to, makes it itself;
    what it raises is raised in each of them.

    Args:
        name: Says what it is.
        about: What decides the answer, with a representation of its own; calls with the same are
            told apart by their order.
        make: Called while the others wait.
    """
    if find_place().world == 1:
        return make()
    key = hashlib.sha256(f"{name} {about!r}".encode()).hexdigest()[:24]
    _calls[key] += 1
    folder = _find_folder()
    answer = folder / f"{key}-{_calls[key]}"
    with holding_lock(folder / f"{answer.name}.lock", f"the same work ({name})"):
        with contextlib.suppress(OSError):
            return answer.read_text(encoding="utf-8")
        made = make()
        with contextlib.suppress(OSError):
            answer.write_text(made, encoding="utf-8")
        return made


def stamp_paths(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells whether files changed."""
    stats = [(path, path.stat()) for path in paths]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@cache
def _find_folder() -> Path:
    """One for each launch on this machine: those that it started have the same parent."""
    root = get_cache_folder() / "launches"
    # Answers of launches that are over are few and small, and wait for the next one.
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            pid = folder.name.partition("-")[0]
            if pid.isdecimal() and folder.name != _name_process(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
    return root / _name_process(os.getppid())


def _name_process(pid: int) -> str:
    """A name that no other process of this machine ever has: numbers are given anew."""
    import psutil

    try:
        return f"{pid}-{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return f"{pid}-gone"
