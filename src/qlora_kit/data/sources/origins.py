"""Where rows came from, in a form that reads them again, and which files a pattern names."""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from qlora_kit.data.sources.file_readers import READERS
from qlora_kit.errors import ConfigError, DataNotFoundError, UnknownOptionError, did_you_mean
from qlora_kit.paths import describe_nearest, expand_path, is_modelscope_name
from qlora_kit.values import is_finite_number

__all__ = ["DataSource", "RowOrigin", "find_files", "list_paths", "pick_rows"]

_MAGIC: Final = frozenset("*?[")


#: Far more often than anyone repeats a row.
_MOST_TIMES = 10_000


@dataclass(frozen=True)
class DataSource:
    """A file or data set that is one of several.

    Attributes:
        path: A file, a folder, a pattern such as ``"parts/*.jsonl"`` or a hub data set's name.
        split: Which split; by default the one asked for of all.
        weight: How often each row is taken: ``2`` takes every row twice, ``0.5`` a random half.
        columns: Which of its columns holds which role, for example
            ``{"instruction": "question"}``.
    """

    path: str
    split: str | None = None
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not os.fspath(self.path):
            raise ConfigError(f"path must be a file, a folder or a name, got {self.path!r}.")
        object.__setattr__(self, "path", os.fspath(self.path))
        if not is_finite_number(self.weight) or not 0 < self.weight <= _MOST_TIMES:
            raise ConfigError(
                f"weight must be a number above 0, and at most {_MOST_TIMES:,}: so often each row "
                f"of {self.path!r} is taken. Got {self.weight!r}.",
                parameter="weight",
            )
        if self.split is not None and not isinstance(self.split, str):
            raise ConfigError(f"split must be the name of a split, got {self.split!r}.")
        if not isinstance(self.columns, Mapping):
            raise ConfigError(f"columns must map roles to columns, got {self.columns!r}.")

    @classmethod
    def read(cls, value: object) -> DataSource:
        """A source from what a recipe says of it.

        Raises:
            ConfigError: When it is neither a path nor a table with the names above.
        """
        if isinstance(value, DataSource):
            return value
        if isinstance(value, str | os.PathLike):
            return cls(os.fspath(value))
        if not isinstance(value, Mapping) or "path" not in value:
            raise ConfigError(f"Data is a path, or a table with a path; got {value!r}.")
        known = ("path", "split", "weight", "columns")
        for name in value:
            if name not in known:
                raise UnknownOptionError(
                    f"A data source has no {name!r}.{did_you_mean(str(name), known)} It has: "
                    f"{', '.join(known)}.",
                    parameter=str(name),
                )
        return cls(**value)


class RowOrigin(NamedTuple):
    """What it takes to read rows again.

    Attributes:
        sources: Files and data sets, in order.
        seed: What chose rows where a source's weight is no whole number.
        held_out: ``(fraction, seed, part)`` of a split into ``"train"`` and ``"eval"``.
    """

    sources: tuple[DataSource, ...]
    seed: int = 3407
    held_out: tuple[float, int, str] | None = None

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        held_out = self.held_out
        return {
            "sources": [asdict(source) for source in self.sources],
            "seed": self.seed,
            "held_out": None if held_out is None else dict(
                zip(("fraction", "seed", "part"), held_out, strict=True)
            ),
        }  # fmt: skip


def list_paths(source: object) -> list[DataSource] | None:
    """The sources in a list of paths, or ``None`` for a list of rows."""
    if not isinstance(source, Sequence) or isinstance(source, str | bytes) or not source:
        return None
    if all(isinstance(one, DataSource | os.PathLike) or _is_path(one) for one in source):
        return [DataSource.read(one) for one in source]
    return None


def _is_path(value: object) -> bool:
    """Whether text in a list is a file rather than a row."""
    if not isinstance(value, str) or len(value) >= 4096 or "\n" in value:
        return False
    has_suffix = Path(value).suffix.lower() in READERS
    return has_suffix or is_modelscope_name(value) or os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111


def find_files(name: str) -> list[str] | None:
    """The files that a pattern names, sorted; ``None`` where it is no pattern.

    Raises:
        DataNotFoundError: When it names none.
    """
    path = expand_path(name)
    if not _MAGIC & set(name) or os.path.exists(path):  # noqa: PTH110
        return None
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not found:
        raise DataNotFoundError(f"No file matches {name}.{describe_nearest(path)}")
    return found


def pick_rows(rows: Sequence[Any], weight: float, seed: int) -> list[Any]:
    """Every row as often as a weight says; what is left of it takes a random share, in order."""
    times = int(weight)
    picked = list(rows) * times
    share = round((weight - times) * len(rows))
    chosen = sorted(random.Random(seed).sample(range(len(rows)), share))
    return picked + [rows[index] for index in chosen]
