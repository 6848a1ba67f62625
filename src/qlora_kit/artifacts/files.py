"""The files of an export: names, sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from qlora_kit.results import ArtifactFile

__all__ = ["describe_file", "hash_file", "list_files"]

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
