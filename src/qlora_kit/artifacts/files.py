"""The files of an export or a checkpoint: names, sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from qlora_kit.results import ArtifactFile

__all__ = ["describe_file", "find_damaged_file", "hash_file", "list_files"]

_CHUNK: Final = 4 * 1024 * 1024
_THREADS: Final = 4


def list_files(folder: Path, known_sha256: Mapping[str, str] | None = None) -> list[ArtifactFile]:
    """Every file below a folder, sorted by name, hashed unless its hash is known.

    Args:
        folder: The folder.
        known_sha256: Hashes computed while writing, by file name.
    """
    known = known_sha256 or {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda path: describe_file(path, folder, known), paths))


def describe_file(
    path: Path, folder: Path, known_sha256: Mapping[str, str] | None = None
) -> ArtifactFile:
    """One file's entry in an artifact."""
    name = path.relative_to(folder).as_posix()
    digest = (known_sha256 or {}).get(name) or hash_file(path)
    return ArtifactFile(name, path.stat().st_size, digest)


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def find_damaged_file(folder: Path, files: Iterable[Any]) -> str | None:
    """The first file that is not as a manifest says, in words; ``None`` when all are.

    Args:
        folder: Where they should be.
        files: The manifest's entries, with ``name``, ``size`` and ``sha256``.
    """
    for entry in files:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            return "its manifest is damaged: it lists a file without a name"
        path = folder / entry["name"]
        try:
            size = path.stat().st_size
            if size != entry.get("size"):
                return f"{path} is damaged: {size} bytes instead of {entry.get('size')}"
            if hash_file(path) != entry.get("sha256"):
                return f"{path} is damaged: its bytes are not those that were saved"
        except FileNotFoundError:
            return f"{path} is damaged: it is gone"
        except (OSError, ValueError) as error:
            return f"{path} is damaged: {error}"
    return None
