"""Where files are kept, and what lies near a path that does not exist."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from qlora_kit.errors import ConfigError

__all__ = [
    "CACHE_VARIABLE",
    "MODELSCOPE",
    "describe_nearest",
    "expand_path",
    "get_cache_folder",
    "is_modelscope_name",
    "looks_like_hub_name",
    "suggest_existing",
    "trial_folder",
]

#: Where files that are made once and kept go, instead of ``~/.cache/qlora_kit``.
CACHE_VARIABLE = "QLORA_KIT_CACHE"

#: What stands before the names of ModelScope's models and data sets.
MODELSCOPE = "modelscope:"

#: Characters of a path that are shown.
_SHOWN = 200

#: Files that neither a model nor a data set of the hub is called after.
_OTHER_SUFFIXES = (".txt", ".tsv", ".xlsx", ".gz", ".zip", ".bin", ".pt", ".safetensors")


def get_cache_folder(chosen: str | None = None) -> Path:
    """The folder for files that are made once and kept.

    Args:
        chosen: A folder that was asked for; it goes before the environment's.
    """
    chosen = chosen or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return expand_path(chosen)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qlora_kit"


def expand_path(path: str | os.PathLike[str]) -> Path:
    """A path with its ``~`` replaced, if it is one that a file system can hold.

    Raises:
        ConfigError: For the home of nobody, zero bytes, and names that are too long.
    """
    shown, length = repr(os.fspath(path)), len(os.fspath(path))
    shown = shown if length <= _SHOWN else f"{shown[:_SHOWN]}..., {length} characters,"
    try:
        expanded = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            expanded.lstat()
    except RuntimeError as error:
        raise ConfigError(
            f"{shown} names the home of a user that does not exist here. Give the whole path."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{shown} cannot be a path: {getattr(error, 'strerror', None) or error}."
        ) from error
    return expanded


@contextlib.contextmanager
def trial_folder(folder: Path) -> Iterator[Path]:
    """A folder, made with its parents where it is missing; what was made is removed afterwards.

    Args:
        folder: The folder to try out.

    Raises:
        OSError: Where it cannot be made.
    """
    made = []
    for part in (folder, *folder.parents):
        if part.exists():
            break
        made.append(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        for part in made:
            # Unless another process uses it meanwhile.
            with contextlib.suppress(OSError):
                part.rmdir()


def is_modelscope_name(name: str) -> bool:
    """Whether a name says that it is one of ModelScope."""
    return name.startswith(MODELSCOPE)


def looks_like_hub_name(name: str, file_suffixes: Collection[str] = ()) -> bool:
    """Whether a name that no file has may be one of a hub: ``owner/name`` or ``name``.

    ModelScope's names, which say so, are such names.

    Args:
        name: What was given.
        file_suffixes: Suffixes of the files the caller reads, such as ``".gguf"``; a name with one
            of them is a file that is missing.
    """
    name = name.removeprefix(MODELSCOPE)
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and Path(
        name
    ).suffix.lower() not in {*file_suffixes, *_OTHER_SUFFIXES}


def suggest_existing(path: Path) -> str:
    """A ``" Did you mean 'x'?"`` suffix with existing paths that resemble one that does not exist.

    Empty where none does, so that it fits names that may not have been meant as paths too.
    """
    missing, names = _look_beside(path)
    near = difflib.get_close_matches(missing.name, names)
    paths = [repr(str(missing.with_name(name))) for name in near]
    return f" Did you mean {' or '.join(paths)}?" if paths else ""


def describe_nearest(path: Path) -> str:
    """The same, or else what there is beside a path that does not exist."""
    missing, names = _look_beside(path)
    listing = f" {missing.parent.absolute()} holds: {', '.join(names[:8])}." if names else ""
    return suggest_existing(path) or listing


def _look_beside(path: Path) -> tuple[Path, list[str]]:
    """The first part of a path that does not exist, and the names that do exist beside it."""
    parent = path.parent
    # Path.is_dir() raises for names that no file system can hold.
    while not os.path.isdir(parent) and parent != parent.parent:  # noqa: PTH112
        path, parent = parent, parent.parent
    entries = parent.iterdir() if os.access(parent, os.R_OK) else ()
    return path, sorted(e.name for e in entries if not e.name.startswith("."))
