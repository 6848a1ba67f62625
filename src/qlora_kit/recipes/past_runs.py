"""The recipe of a run that has been, from the manifest that it left behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import ConfigError
from qlora_kit.manifest import MANIFEST_NAME, read_manifest
from qlora_kit.paths import describe_nearest, expand_path

__all__ = ["recipe_from_run"]

logger = logging.getLogger(__name__)


def recipe_from_run(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that repeats a past run, with the exports that lie beside it.

    On the same machine, with the same versions, it gives the same adapter. It writes to a folder
    of its own, ``OUTPUT_DIR-again``.

    Args:
        output_dir: The output folder of a run, with its ``qlora_kit_manifest.json``.

    Returns:
        Sections and their settings, for :func:`~qlora_kit.recipes.write_recipe` and
        :func:`~qlora_kit.run_recipe`.

    Raises:
        ConfigError: When the folder holds no run, or one that a file cannot repeat; says why.
    """
    folder = expand_path(output_dir)
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / MANIFEST_NAME} cannot be read: {error}") from error
    if not manifest:
        near = "" if folder.is_dir() else describe_nearest(folder)
        raise ConfigError(f"{folder} holds no {MANIFEST_NAME} of a run.{near}")
    kept = manifest.get("recipe")
    if manifest.get("kind") != "training" or not isinstance(kept, Mapping):
        raise ConfigError(
            f"{folder / MANIFEST_NAME} is of kind {manifest.get('kind')!r} and has no recipe. Give "
            "the output folder of a run that this version made."
        )
    left_out = kept.get("left_out") or []
    recipe = {name: dict(kept.get(name) or {}) for name in ("model", "adapter", "data", "training")}
    if "train" not in recipe["data"]:
        raise ConfigError(
            f"The run in {folder} cannot be repeated from a file: {'; '.join(left_out)}. Write the "
            "rows to a file, and train on that."
        )
    for phrase in left_out:
        logger.warning("A recipe cannot say %s; the run will lack it.", phrase)
    if (manifest.get("run") or {}).get("resumed_from"):
        logger.warning("The run went on from a checkpoint; its recipe does all of it at once.")
    if manifest.get("result", {}).get("was_interrupted"):
        logger.warning("The run was interrupted; its recipe goes to the end.")
    recipe["training"]["output_dir"] = f"{folder.absolute()}-again"
    formats = _find_exports(folder)
    recipe["export"] = {"formats": list(formats), **{k: v for k, v in formats.items() if v}}
    return recipe


def _find_exports(folder: Path) -> dict[str, dict[str, Any]]:
    """The formats of the artifacts in a folder, and the options that each was made with."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        try:
            manifest = read_manifest(path)
        except (OSError, ValueError):
            continue
        name = manifest.get("format")
        if manifest.get("kind") == "artifact" and isinstance(name, str) and name == path.name:
            options = manifest.get("options")
            found[name] = {
                key: value
                for key, value in (options if isinstance(options, Mapping) else {}).items()
                if value is not None
            }
    return found
