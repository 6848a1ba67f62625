"""A fine-tuning in a file: model, adapter, data, training and exports as TOML or YAML.

This package reads and writes recipes and checks their keys. What they ask for is done by the
pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from qlora_kit.pipeline import PipelineResult, check_pipeline, run_pipeline
from qlora_kit.recipes.files import read_recipe, write_recipe
from qlora_kit.recipes.past_runs import recipe_from_run
from qlora_kit.recipes.sections import make_pipeline, merge_recipes
from qlora_kit.results import TrainResult

__all__ = [
    "make_pipeline",
    "merge_recipes",
    "read_recipe",
    "recipe_from_run",
    "run_recipe",
    "write_recipe",
]


def run_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    on_trained: Callable[[TrainResult], None] | None = None,
) -> PipelineResult:
    """Do what a recipe says: load, attach, train and export, after everything was checked.

    Args:
        recipe: A ``.toml`` or ``.yaml`` file, or its content as nested dictionaries. Relative
            paths are relative to the file; in a dictionary, to the working folder.
        settings: What takes the place of the recipe's own, by section:
            ``{"training": {"max_steps": 10}}``.
        on_trained: Called with the training's result before anything is exported.

    Returns:
        The model, its training and its exports.

    Raises:
        ConfigError: When the file cannot be read or a value cannot work;
            ``UnknownOptionError`` for unknown sections and keys, with the nearest names. All of
            it before a weight is read.
        QloraKitError: What a stage raises.
    """
    content = read_recipe(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    pipeline = make_pipeline(merge_recipes(content, settings or {}))
    return run_pipeline(check_pipeline(pipeline), on_trained=on_trained)
