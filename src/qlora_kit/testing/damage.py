"""Ways in which an export goes wrong, done on purpose to a copy of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qlora_kit.artifacts.files import describe_file
from qlora_kit.manifest import MANIFEST_NAME

__all__ = ["DAMAGES", "copy_export", "find_weight_files"]

#: The rest are small files that repeat a hash or a number of the large ones.
_LEAST_SHARE: Final = 0.01
_MOST_FILES: Final = 3


def find_weight_files(one: Path, other: Path) -> list[str]:
    """Names of the files that hold the model, largest first.

    Args:
        one: An export.
        other: The same with another adapter; what differs depends on the weights.
    """
    differing = []
    for path in (path for path in one.rglob("*") if path.is_file()):
        twin = other / path.relative_to(one)
        if path.name == MANIFEST_NAME or not twin.is_file():
            continue
        if describe_file(path, one).sha256 != describe_file(twin, other).sha256:
            differing.append(path)
    sizes = {str(path.relative_to(one)): path.stat().st_size for path in differing}
    least = max(sizes.values(), default=0) * _LEAST_SHARE
    large = [name for name, size in sizes.items() if size >= least]
    return sorted(large, key=lambda name: -sizes[name])[:_MOST_FILES]


@contextmanager
def copy_export(folder: Path) -> Iterator[Path]:
    """A copy to damage, as it was when ``write`` had finished."""
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(parent) / folder.name
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(MANIFEST_NAME))
        yield copy


def _remove(file: Path, other: Path) -> None:
    file.unlink()


def _cut(file: Path, other: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def _invert(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    middle = slice(len(data) * 3 // 8, len(data) * 5 // 8)
    data[middle] = bytes(255 - byte for byte in data[middle])
    file.write_bytes(data)


def _replace(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


#: What happened to a file, and how to do it to ``file`` given the one of another adapter.
DAMAGES: Final[Mapping[str, Callable[[Path, Path], None]]] = {
    "missing": _remove,
    "cut in half": _cut,
    "inverted in its middle quarter": _invert,
    "replaced by another adapter's": _replace,
}
