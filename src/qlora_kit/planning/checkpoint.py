"""The configuration of a model whose weights may not be here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qlora_kit.config import LoadConfig
from qlora_kit.engines.base_model import read_model_config
from qlora_kit.engines.quantization import read_stored_quantization
from qlora_kit.errors import ConfigError, ModelNotFoundError, OfflineError
from qlora_kit.messages import Setting
from qlora_kit.modelscope import find_on_modelscope
from qlora_kit.paths import describe_nearest, is_modelscope_name, looks_like_hub_name
from qlora_kit.pipeline import Pipeline

__all__ = ["Configuration", "open_configuration"]


@dataclass(frozen=True)
class Configuration:
    """What is known of a model without its weights.

    Attributes:
        folder: Where its ``config.json`` lies.
        model_config: transformers' configuration.
        quantization: How it will be held in memory.
    """

    folder: Path
    model_config: Any
    quantization: str | None


def open_configuration(pipeline: Pipeline) -> Configuration:
    """Read ``config.json`` of a pipeline's model, of its base where it is an adapter.

    Raises:
        ModelNotFoundError: When there is none.
        OfflineError: When it would have to be downloaded.
        UnsupportedModelError: When transformers cannot read it.
    """
    names = {field.name for field in fields(LoadConfig)} - {"dtype", "cache_dir"}
    given = {name: value for name, value in pipeline.loading.items() if name in names}
    if given.get("load_in_4bit") is None:
        given["load_in_4bit"] = not given.get("load_in_8bit", False)
    config = LoadConfig(model_name=os.fspath(pipeline.model), **given)
    folder = _find(config.model_name, config)
    adapter = _read_json(folder / "adapter_config.json")
    if adapter.get("base_model_name_or_path"):
        folder = _find(str(adapter["base_model_name_or_path"]), config)
    stored = read_stored_quantization(folder)
    wanted = "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None
    return Configuration(folder, read_model_config(folder, config), stored or wanted)


def _find(name: str, config: LoadConfig) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        raise ConfigError(
            f"{path} is a file. A plan reads config.json: give the folder or hub name of the model "
            "that it was made from."
        )
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ModelNotFoundError(f"{path} has no config.json, which is what a plan reads.")
        return path
    # No weights: a few megabytes.
    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    if is_modelscope_name(name):
        return find_on_modelscope(
            name, "model", local_files_only=config.local_files_only, revision=config.revision,
            token=config.token, allow_patterns=patterns,
        )  # fmt: skip
    if not looks_like_hub_name(name):
        raise ModelNotFoundError(f"There is nothing at {path}.{describe_nearest(path)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=config.revision, local_files_only=config.local_files_only,
                token=config.token, allow_patterns=patterns,
            )
        )  # fmt: skip
    except OSError as error:
        if not config.local_files_only:
            raise ModelNotFoundError(f"{name!r} could not be downloaded: {error}") from error
        raise OfflineError(
            f"There is no folder {name!r}, and no model of that name in the local hub cache.",
            advice=(
                "Allow downloading its configuration with ",
                Setting("local_files_only", False, "load_quantized"),
                ".",
            ),
        ) from error


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, Mapping) else {}
