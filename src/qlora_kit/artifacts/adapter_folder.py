"""A saved adapter's folder, as peft and the tools around it write it: what it is, and its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qlora_kit.artifacts.files import hash_file, read_json_object
from qlora_kit.errors import ModelNotFoundError, UnsupportedModelError
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.paths import looks_like_hub_name

__all__ = ["find_base_of", "has_own_tokenizer", "is_adapter", "read_adapter_config"]

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(path: Path) -> bool:
    """Whether a path is the folder of a saved adapter; axolotl puts a config.json in as well."""
    return path.is_dir() and (path / _CONFIG).is_file()


def has_own_tokenizer(model: LoadedModel) -> bool:
    """Whether a model's tokenizer came with its adapter, and is another than the base's."""
    return is_adapter(Path(model.tokenizer.name_or_path))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        ModelNotFoundError: When there are no weights beside it.
        UnsupportedModelError: When it is of an adapter of another kind than LoRA, or of a model
            that writes no texts.
    """
    saved = read_json_object(folder / _CONFIG)
    kind = saved.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{folder} holds a {kind} adapter; LoRA adapters can be loaded here. Load it with peft."
        )
    task = saved.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(
            f"{folder} holds an adapter for the task {task}, and language models that continue a "
            "text (CAUSAL_LM) are loaded here. Load it with peft."
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ModelNotFoundError(
            f"{folder} has an {_CONFIG} but no {_WEIGHTS[0]}. Copy the adapter's weights into it."
        )
    return saved


def find_base_of(folder: Path, saved: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The base an adapter was trained on.

    ``adapter_config.json`` decides where its user changed it; else the manifest knows better
    what was asked for, such as the ``.gguf`` file behind a cached checkpoint.

    Args:
        folder: The adapter's folder.
        saved: Its ``adapter_config.json``.
        manifest: Its manifest, or an empty mapping.

    Raises:
        ModelNotFoundError: When neither names a base that is there or could be on the hub.
    """
    base = manifest.get("base")
    remembered = base.get("name_or_path") if isinstance(base, Mapping) else None
    stated = saved.get("base_model_name_or_path")
    names = [stated] if stated and _is_edited(folder, manifest) else [remembered, stated]
    candidates = [str(name) for name in names if name]
    for name in candidates:
        # Not Path.exists, which raises over names that no file system can hold.
        if os.path.exists(name) or os.path.exists(folder / name):  # noqa: PTH110
            return name if os.path.exists(name) else str(folder / name)  # noqa: PTH110
    giving = ("Give it with ", Setting("base", ..., "load_quantized"), ", or ")
    if not candidates:
        raise ModelNotFoundError(
            f"{folder / _CONFIG} does not say which base model it belongs to.",
            advice=(*giving, "set base_model_name_or_path there."),
        )
    hub_names = [name for name in candidates if looks_like_hub_name(name, (".gguf",))]
    if hub_names:
        return hub_names[0]
    raise ModelNotFoundError(
        f"The adapter {folder} was trained on {candidates[0]}, which is not there any more.",
        advice=(
            "Put the base back. ",
            *giving,
            f"set base_model_name_or_path in {folder / _CONFIG}.",
        ),
    )


def _is_edited(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether ``adapter_config.json`` is another than the one its manifest was written beside."""
    files = manifest.get("files")
    listed = {
        file.get("name"): file.get("sha256")
        for file in (files if isinstance(files, list) else ())
        if isinstance(file, Mapping)
    }
    return listed.get(_CONFIG) != hash_file(folder / _CONFIG)
