"""Where rows come from: a file, a folder, a hub name, a ``datasets`` object or a list.

This module finds the rows and names their source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qlora_kit.boundaries import describe_cause, shown_cause, translate_errors
from qlora_kit.data.sources.file_readers import READERS, RawRow, drop_nulls_inside, read_file
from qlora_kit.data.sources.origins import (
    DataSource,
    RowOrigin,
    find_files,
    list_paths,
    pick_rows,
)
from qlora_kit.data.sources.row_problems import Location
from qlora_kit.errors import (
    ConfigError,
    DataError,
    DataNotFoundError,
    OfflineError,
    QloraKitError,
    did_you_mean,
)
from qlora_kit.messages import Setting
from qlora_kit.modelscope import find_on_modelscope
from qlora_kit.paths import (
    describe_nearest,
    expand_path,
    is_modelscope_name,
    looks_like_hub_name,
    suggest_existing,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RawRow", "RawRows", "read_source"]

_SPLIT_NAMES: Final = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})
#: Files that describe a dataset and are not part of it.
_METADATA: Final = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)


class RawRows(NamedTuple):
    """A source that has been read, before anyone asked what its rows should hold.

    Attributes:
        label: What to call it.
        rows: Its rows, in order.
        origin: What it takes to read them again; ``None`` for rows that were in memory.
    """

    label: str
    rows: list[RawRow]
    origin: RowOrigin | None = None

    def __repr__(self) -> str:
        return f"RawRows({len(self.rows):,} from {self.label})"

    @property
    def columns(self) -> list[str]:
        """Every column that a row has, in the order they appear."""
        mappings = (row.value for row in self.rows if isinstance(row.value, Mapping))
        return list(dict.fromkeys(str(name) for row in mappings for name in row))


def read_source(
    source: Any, split: str = "train", *, local_files_only: bool = True, seed: int = 3407
) -> RawRows:
    """The rows of a source, and what to call it; what was read already is as it is.

    Args:
        source: A path, a pattern, a name, rows in memory, or a list of paths and of
            :class:`DataSource`.
        split: Which split, where there are several.
        local_files_only: Never touch the network.
        seed: Chooses rows of sources whose weight is no whole number.

    Raises:
        DataError: When there is nothing readable there.
        OfflineError: When it is a hub dataset that would have to be downloaded.
    """
    if isinstance(source, RawRows):
        return source
    if not isinstance(split, str):
        raise ConfigError(f"split must be the name of a split, got {split!r}.", parameter="split")
    if isinstance(source, DataSource):
        source = [source]
    several = list_paths(source)
    if several is not None:
        return _read_several(several, split, seed, local_files_only=local_files_only)
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        try:
            files = find_files(name)
            if files is not None:
                parts = [DataSource(file) for file in files]
                read = _read_several(parts, split, seed, local_files_only=local_files_only)
                return read._replace(label=f"{name} ({len(files)} files)")
            read = _read_named(name, split, local_files_only=local_files_only)
            where = expand_path(name)
            kept = str(where.absolute()) if where.exists() else name
            return read._replace(origin=RowOrigin((DataSource(kept, split),), seed))
        except QloraKitError:
            raise
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error}") from error
    if isinstance(source, Mapping):
        return _read_splits(source, split)
    if hasattr(source, "features") and hasattr(source, "column_names"):
        if not hasattr(source, "__len__"):
            raise DataError(
                "A streaming dataset has no length and cannot be read whole. Take what you need "
                "first: list(dataset.take(10_000))."
            )
        return _read_dataset(source, "the datasets.Dataset")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        # pandas keeps lists as arrays where a table came from Parquet.
        source = [drop_nulls_inside(_to_plain(row)) for row in source.to_dict("records")]
    elif hasattr(source, "to_dicts") and hasattr(source, "columns"):
        source = [drop_nulls_inside(row) for row in source.to_dicts()]
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        rows = [RawRow(Location(index), value) for index, value in enumerate(source)]
        return RawRows(f"a list of {len(rows):,}", rows)
    raise DataError(
        f"Rows cannot be read from {type(source).__name__}. Give a file, a folder, a hub dataset's "
        "name, a datasets.Dataset or a list of dictionaries."
    )


def _read_several(
    sources: Sequence[DataSource], split: str, seed: int, *, local_files_only: bool
) -> RawRows:
    """The rows of several sources, one after the other, each as often as its weight says."""
    rows: list[RawRow] = []
    origins: list[DataSource] = []
    for source in sources:
        read = read_source(
            source.path, source.split or split, local_files_only=local_files_only, seed=seed
        )
        taken = _rename(read, source.columns)
        for row in pick_rows(taken, source.weight, seed):
            place = row.location if len(sources) == 1 else row.location._replace(
                file=row.location.file or source.path
            )  # fmt: skip
            rows.append(row._replace(location=place))
        origins += [
            replace(part, weight=source.weight, columns=source.columns)
            for part in (() if read.origin is None else read.origin.sources)
        ]
    label = sources[0].path if len(sources) == 1 else ", ".join(one.path for one in sources)
    shown = label if len(label) <= 80 else f"{len(sources)} sources"
    return RawRows(shown, rows, RowOrigin(tuple(origins), seed))


def _rename(read: RawRows, columns: Mapping[str, str]) -> list[RawRow]:
    """The rows with the columns of a source called by their roles."""
    if not columns:
        return read.rows
    present = read.columns
    for role, column in columns.items():
        if present and column not in present:
            raise DataError(
                f"{read.label} has no column {column!r} for {role!r}."
                f"{did_you_mean(str(column), present)} It has: "
                f"{', '.join(map(repr, present[:12]))}."
            )
        if role in present and role != column and role not in columns.values():
            raise DataError(
                f"{read.label} has a column {role!r} already, so that {column!r} cannot be called "
                f"that. Give the rows one of the two."
            )
    roles = {column: role for role, column in columns.items()}
    return [
        row._replace(value={roles.get(name, name): value for name, value in row.value.items()})
        if isinstance(row.value, Mapping)
        else row
        for row in read.rows
    ]


def _to_plain(value: Any) -> Any:
    """A value with lists and numbers of Python in place of NumPy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _to_plain(inner) for key, inner in value.items()}
    return [_to_plain(inner) for inner in value] if isinstance(value, list) else value


def _read_named(name: str, split: str, *, local_files_only: bool) -> RawRows:
    if not name.strip():
        raise DataError("The source is an empty name; give a file, a folder or a dataset's name.")
    if "://" in name:
        raise DataError(f"{name} is an address. Download the file first, then give its path.")
    path = expand_path(name)
    if path.is_file():
        return RawRows(str(path), read_file(path))
    if path.is_dir():
        return RawRows(str(path), _read_folder(path, split))
    if is_modelscope_name(name):
        folder = find_on_modelscope(name, "dataset", local_files_only=local_files_only)
        return RawRows(name, _read_folder(folder, split))
    if not looks_like_hub_name(name, READERS):
        raise DataNotFoundError(f"There is nothing at {path}.{describe_nearest(path)}")
    return _read_hub(name, path, split, local_files_only=local_files_only)


def _read_folder(folder: Path, split: str) -> list[RawRow]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from datasets import load_from_disk

        with translate_errors(
            lambda error: DataError(
                f"{folder} is no dataset that save_to_disk wrote, or is not whole: "
                f"{describe_cause(error)} Save it again."
            )
        ):
            saved = load_from_disk(str(folder))
        if isinstance(saved, Mapping):
            return _read_splits(saved, split).rows
        return _read_dataset(saved, str(folder)).rows
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in READERS
        and file.name not in _METADATA
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        inside = sorted(entry.name for entry in folder.iterdir())[:8]
        raise DataError(
            f"{folder} has no {', '.join(READERS)} files. It holds: "
            f"{', '.join(inside) or 'nothing'}."
        )
    files = _choose_split(folder, files, split)
    if len(files) == 1:
        return read_file(files[0])
    rows: list[RawRow] = []
    for file in files:
        name = str(file.relative_to(folder))
        rows += [row._replace(location=row.location._replace(file=name)) for row in read_file(file)]
    return rows


def _choose_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files named after the split, as in ``train-00000-of-00002.parquet``; or all of them."""
    words = {
        file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files
    }
    if not any(words[file] & (_SPLIT_NAMES | {split.lower()}) for file in files):
        return files
    chosen = [file for file in files if split.lower() in words[file]]
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise DataError(
            f"No file in {folder} is named after the split {split!r}. There are: {names}.",
            advice=(
                "Choose with ",
                Setting("split", ..., "read_source"),
                ", or give the file itself.",
            ),
        )
    return chosen


def _read_splits(splits: Mapping[str, Any], split: str) -> RawRows:
    if split in splits:
        read = read_source(splits[split], split)
        return read._replace(label=f"{read.label} (split {split!r})")
    names = ", ".join(map(repr, splits))
    raise DataError(
        f"There is no split {split!r}.{did_you_mean(split, [str(name) for name in splits])} "
        f"There are: {names or 'none'}. A table of columns is given as a list of rows or as a "
        "datasets.Dataset."
    )


def _read_dataset(dataset: Dataset, label: str) -> RawRows:
    rows = [
        RawRow(Location(index), drop_nulls_inside(value))
        for index, value in enumerate(dataset.to_list())
    ]
    return RawRows(f"{label} of {len(rows):,} rows", rows)


def _find_cached_commit(name: str) -> str | None:
    """The newest commit of a data set in the hub's cache; ``None`` where the cache names one.

    datasets keeps what it downloads under its commit, without noting that it is the main one.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
    if (folder / "refs" / "main").is_file() or not (folder / "snapshots").is_dir():
        return None
    commits = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return commits[-1].name if commits else None


def _read_hub(name: str, path: Path, split: str, *, local_files_only: bool) -> RawRows:
    if not local_files_only:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError

        try:
            return _read_dataset(load_dataset(name, split=split), name)
        except (DatasetNotFoundError, OSError, ValueError) as error:
            raise DataNotFoundError(
                f"{name!r} could not be downloaded: {describe_cause(error)}"
            ) from shown_cause(error)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=_find_cached_commit(name), local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise OfflineError(
            f"There is no file or folder {name!r}, and no dataset of that name in the local "
            f"hub cache.{suggest_existing(path)}",
            advice=(
                "Download the dataset first, or allow that here with ",
                Setting("local_files_only", False, "read_source"),
                ".",
            ),
        ) from error
    return RawRows(name, _read_folder(Path(folder), split))
