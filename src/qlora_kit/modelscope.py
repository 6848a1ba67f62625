"""ModelScope's models and data sets, by names such as ``"modelscope:Qwen/Qwen3-4B"``.

Downloading and its cache are the package modelscope-hub's own; MODELSCOPE_ENDPOINT and
MODELSCOPE_CACHE are its settings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from qlora_kit.boundaries import describe_cause, shown_cause
from qlora_kit.errors import (
    DataNotFoundError,
    MissingDependencyError,
    ModelNotFoundError,
    OfflineError,
)
from qlora_kit.messages import Setting
from qlora_kit.paths import MODELSCOPE

__all__ = ["find_on_modelscope"]

logger = logging.getLogger(__name__)

_WORDS: Final = {"model": "model", "dataset": "data set"}


def find_on_modelscope(
    name: str,
    kind: Literal["model", "dataset"],
    *,
    local_files_only: bool,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """The local folder behind a ModelScope name; only what was downloaded before, unless allowed.

    Args:
        name: ``"modelscope:owner/name"``.
        kind: What it names.
        local_files_only: Ask nobody: take what lies in ModelScope's cache.
        revision: Branch or tag; ``master`` by default.
        cache_dir: Another cache than ModelScope's own.
        token: A token of ModelScope, for repositories that are not public.
        allow_patterns: Download only files that match one.

    Raises:
        MissingDependencyError: When modelscope-hub is not installed.
        OfflineError: When it is not in the cache and nothing may be asked.
        ModelNotFoundError: When a model cannot be downloaded; ``DataNotFoundError`` for data.
    """
    not_found = ModelNotFoundError if kind == "model" else DataNotFoundError
    repository = name.removeprefix(MODELSCOPE)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise not_found(f"{name!r} names nothing on ModelScope; write {MODELSCOPE}owner/name.")
    try:
        from modelscope_hub.compat import snapshot_download
        from modelscope_hub.errors import HubError
    except ImportError as error:
        raise MissingDependencyError(
            f"{name!r} is found with the package modelscope-hub, which cannot be imported "
            f"({error}). pip install modelscope-hub, or the extra modelscope of this package."
        ) from error
    try:
        found: str = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            local_files_only=local_files_only,
        )
    except (HubError, OSError, ValueError) as error:
        if local_files_only:
            raise OfflineError(
                f"There is no {_WORDS[kind]} {repository!r} in ModelScope's local cache.",
                advice=(
                    "Download it first, or allow that here with ",
                    Setting(
                        "local_files_only",
                        False,
                        "load_quantized" if kind == "model" else "read_source",
                    ),
                    ".",
                ),
            ) from error
        raise not_found(
            f"{name!r} could not be downloaded: {describe_cause(error)}"
        ) from shown_cause(error)
    origin = "taken from ModelScope's cache, nobody was asked" if local_files_only else "found"
    logger.info("%s: %s: %s", name, origin, found)
    return Path(found)
