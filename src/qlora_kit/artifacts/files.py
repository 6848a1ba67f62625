"""The files of an export or a checkpoint: names, sizes and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from qlora_kit.boundaries import describe_cause
from qlora_kit.errors import ModelNotFoundError, UnsupportedModelError
from qlora_kit.manifest import MANIFEST_NAME, read_manifest
from qlora_kit.results import ArtifactFile

__all__ = [
    "describe_file",
    "find_damaged_file",
    "hash_file",
    "list_files",
    "list_foreign",
    "read_json_object",
]

_CHUNK: Final = 4 * 1024 * 1024
_THREADS: Final = 4
#: What file managers leave wherever they look.
_DROPPINGS: Final = (".DS_Store", "Thumbs.db", "desktop.ini")


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


def list_foreign(folder: Path) -> list[str]:
    """Names in a folder that no export put there; of one that is no export, whatever is in it."""
    try:
        manifest = read_manifest(folder)
        is_export = manifest["kind"] == "artifact"
        own = {MANIFEST_NAME, *(entry["name"] for entry in manifest["files"])}
    except (OSError, ValueError, LookupError, TypeError):
        is_export, own = False, set()
    if not is_export:
        return sorted(entry.name for entry in folder.iterdir())
    return sorted(
        name
        for path in folder.rglob("*")
        if (name := path.relative_to(folder).as_posix()) not in own
        and path.name not in _DROPPINGS
        and (path.is_symlink() or not path.is_dir())
    )


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


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of a model says.

    Raises:
        ModelNotFoundError: When it cannot be read.
        UnsupportedModelError: When it is no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {describe_cause(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{path} is damaged: it is not JSON ({error}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} is damaged: it holds no JSON object.")
    return content


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
            return f"{path} cannot be read: {error}"
    return None
