"""Encoded datasets kept on disk, found again by content.

The key is a digest of the rows, the formatter and the settings, so a changed row, template
or tokenizer misses, and the same data under another name hits. The folder may be deleted at
any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause
from qlora_kit.file_locks import holding_lock
from qlora_kit.paths import get_cache_folder
from qlora_kit.private_folders import locked_folder, remove_abandoned

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["find_cached", "holding_cache", "make_key", "store"]

logger = logging.getLogger(__name__)

#: Part of every key: raise it when the same rows would be encoded differently.
_FORMAT_VERSION: Final = "2"
_REPORT: Final = "qlora_kit_report.json"


def make_key(*parts: str) -> str:
    """A key from everything that decides the result."""
    return hashlib.sha256("\0".join((_FORMAT_VERSION, *parts)).encode()).hexdigest()[:24]


def holding_cache(key: str) -> contextlib.AbstractContextManager[None]:
    """Let no other process encode what has this key meanwhile."""
    return holding_lock(get_cache_folder() / "encoded" / f"{key}.lock", "encoding the same rows")


def find_cached(key: str) -> tuple[Dataset, dict[str, Any]] | None:
    """The dataset and report stored under a key, if they are there and whole."""
    from datasets import load_from_disk

    folder = get_cache_folder() / "encoded" / key
    if not folder.is_dir():
        return None
    try:
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        dataset = load_from_disk(str(folder))
    # A damaged cache must never stop a training: whatever is wrong, encoding again mends it.
    except Exception as error:  # noqa: BLE001
        logger.warning(
            "The cached dataset in %s cannot be read (%s); encoding again.",
            folder, describe_cause(error),
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return dataset, report


def store(key: str, dataset: Dataset, report: dict[str, Any]) -> Dataset:
    """Keep a dataset; returns it as read back, memory-mapped. A full disk only costs the cache."""
    root = get_cache_folder() / "encoded"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root)
        # Written beside its place and renamed, so that no reader ever sees half of it.
        with locked_folder(root, key) as staging, _without_progress():
            unfinished = staging / key
            dataset.save_to_disk(str(unfinished))
            (unfinished / _REPORT).write_text(json.dumps(report), encoding="utf-8")
            unfinished.rename(root / key)
    except OSError as error:
        # Another process may have kept the same rows meanwhile.
        if not (root / key).is_dir():
            logger.warning("The encoded dataset cannot be kept in %s: %s", root, error)
            return dataset
    found = find_cached(key)
    return dataset if found is None else found[0]


@contextlib.contextmanager
def _without_progress() -> Any:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()
