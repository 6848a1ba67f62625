"""A saved adapter's configuration, as peft reads it, and whether its start can be taken up again.

A start is how A and B began. Most leave the base as it is, and a saved adapter holds all of them;
peft would compute them only to overwrite them, which some starts cannot on quantized weights. The
others took something out of the base's weights, and peft takes it out once more while it loads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Final

from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.weights.adapter import CHANGES_BASE

__all__ = ["changes_base", "read_lora_config"]

logger = logging.getLogger(__name__)

#: Without a value peft fails over them, and there is none to be guessed.
_NEEDED: Final = ("r", "lora_alpha")


def read_lora_config(loaded: LoadedModel, folder: Path, *, is_trainable: bool) -> Any:
    """The ``LoraConfig`` to put a saved adapter on its base with.

    Args:
        loaded: The base.
        folder: The adapter's folder.
        is_trainable: Whether it is to train on.

    Raises:
        ConfigError: For a start that changed the base's weights, on a quantized base.
        UnsupportedModelError: For layers of Megatron-LM, and where rank or alpha are missing.
    """
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in _NEEDED if name in values and values[name] is None]
    if missing:
        raise UnsupportedModelError(
            f"{path} has no value for {' and '.join(missing)}. Write there what the adapter was "
            "trained with."
        )
    if values.get("megatron_config"):
        raise UnsupportedModelError(
            f"{path} asks for Megatron-LM's parallel layers (megatron_config), which this library "
            "does not run. Set it to null there if the adapter was trained on the transformers "
            "model that it names."
        )
    # Some tools write null for what they leave at its default; peft takes it for a value.
    defaults = {field.name: field for field in dataclasses.fields(LoraConfig)}
    values = {
        name: value
        for name, value in values.items()
        if value is not None or name not in defaults or defaults[name].default is None
    }
    # What is saved from here on belongs to the base that it is on.
    values["base_model_name_or_path"] = (
        str(loaded.base.path) if loaded.base.source == "gguf" else loaded.base.name_or_path
    )
    start = values.get("init_lora_weights", True)
    if changes_base(start):
        _refuse_quantized(loaded, folder, start)
    elif isinstance(start, str) and start != "loftq":
        values["init_lora_weights"] = True
        if start == "mica" and is_trainable:
            logger.warning(
                "The adapter in %s was started by MiCA, which trains A alone; from here on A and B "
                "train.", folder,
            )  # fmt: skip
    with warnings.catch_warnings():
        # A merge needs it; peft needs it for a fresh start only, and drops it.
        warnings.filterwarnings("ignore", message="`loftq_config` specified")
        return LoraConfig.from_peft_type(**LoraConfig.check_kwargs(**values))


def changes_base(start: Any) -> bool:
    """Whether a start took something out of the base's weights."""
    return isinstance(start, str) and start.lower().startswith(CHANGES_BASE)


def _refuse_quantized(loaded: LoadedModel, folder: Path, start: str) -> None:
    if loaded.base.quantization is None:
        return
    raise ConfigError(
        f"The adapter in {folder} was started by {start!r}, which changed the base's weights; a "
        f"{loaded.base.quantization} base cannot hold the change, and without it the adapter would "
        "not answer as it was trained.",
        parameter="load_in_4bit",
        value=True,
        advice=(
            "Load with ",
            Setting("load_in_4bit", False, "load_quantized"),
            "; an export of format 'lora' from there fits quantized bases too.",
        ),
    )
