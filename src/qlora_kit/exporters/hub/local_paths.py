"""Local paths taken out of what others will read.

A path says who trained on which machine, and leads nowhere on another one: its last part
stays. This module knows which of an artifact's files hold paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qlora_kit.artifacts.files import describe_file
from qlora_kit.artifacts.model_card import find_base_name
from qlora_kit.handles import LoadedModel
from qlora_kit.manifest import MANIFEST_NAME
from qlora_kit.paths import is_modelscope_name
from qlora_kit.results import ArtifactFile

__all__ = ["hide_base_paths", "hide_paths"]

_CARD: Final = "README.md"
_ADAPTER: Final = "adapter_config.json"


def hide_paths(
    model: LoadedModel, folder: Path, files: Sequence[ArtifactFile]
) -> list[ArtifactFile]:
    """Replace the absolute paths in an artifact's card, adapter configuration and manifest.

    Args:
        model: What was exported.
        folder: The artifact.
        files: What it holds.

    Returns:
        The files as they are now, which the manifest lists too.
    """
    now = {file.name: file for file in files}
    if _CARD in now:
        text = (folder / _CARD).read_text(encoding="utf-8")
        (folder / _CARD).write_text(hide_base_paths(model, text), encoding="utf-8")
        now[_CARD] = describe_file(folder / _CARD, folder)
    if _ADAPTER in now:
        _rewrite(folder / _ADAPTER, {}, sort_keys=True)
        now[_ADAPTER] = describe_file(folder / _ADAPTER, folder)
    if MANIFEST_NAME in now:
        _rewrite(folder / MANIFEST_NAME, now, sort_keys=False)
        now[MANIFEST_NAME] = describe_file(folder / MANIFEST_NAME, folder)
    return list(now.values())


def hide_base_paths(model: LoadedModel, text: str) -> str:
    """A text with the last part of the base's paths instead of them."""
    paths = (find_base_name(model), model.base.name_or_path, str(model.base.path))
    # A longer one may begin with a shorter one.
    for path in sorted(set(paths), key=len, reverse=True):
        given = model.base.name_or_path
        text = text.replace(path, given if is_modelscope_name(given) else _last_part(path))
    return text


def _rewrite(path: Path, files: Mapping[str, ArtifactFile], *, sort_keys: bool) -> None:
    content = _hide(json.loads(path.read_text(encoding="utf-8")))
    for entry in content.get("files", ()):
        if entry["name"] in files:
            file = files[entry["name"]]
            entry["size"], entry["sha256"] = file.size, file.sha256
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")


def _hide(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hide(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide(item) for item in value]
    return _last_part(value) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    """The last part of an absolute path; any other text as it is."""
    is_path = "\n" not in text and len(Path(text).parts) > 2 and Path(text).is_absolute()
    return Path(text).name if is_path else text
