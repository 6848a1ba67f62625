"""The small files beside the weights: configuration and stop tokens.

An exported model must stop where the live one stops, so the stop tokens that training
used are written into ``generation_config.json`` whatever the base said there.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.handles import LoadedModel
from qlora_kit.weights.live import get_hf_model

__all__ = [
    "make_config",
    "write_config",
    "write_generation_config",
]


def make_config(
    model: LoadedModel,
    *,
    dtype: str,
    updates: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration an exported checkpoint has.

    Args:
        model: The live model, whose configuration knows a resized vocabulary.
        dtype: The dtype of the tensors, for example ``"bfloat16"``.
        updates: Values that differ from the live configuration.
        quantization: The ``quantization_config`` to state; ``None`` states none.
    """
    config = copy.deepcopy(get_hf_model(model.model).config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    config.use_cache = True
    text_config = config.get_text_config()
    for name, value in updates.items():
        setattr(text_config, name, value)
        if hasattr(config, name):
            setattr(config, name, value)
    config.dtype = dtype
    config.architectures = [type(get_hf_model(model.model)).__name__]
    if quantization is not None:
        config.quantization_config = dict(quantization)
    return config


def write_config(model: LoadedModel, folder: Path, config: Any) -> None:
    """Write ``config.json``, and the model's own code if it ships any."""
    config.save_pretrained(str(folder))
    if getattr(config, "auto_map", None):
        for file in model.base.path.glob("*.py"):
            shutil.copy2(file, folder / file.name)


def write_generation_config(model: LoadedModel, folder: Path) -> None:
    """Write ``generation_config.json`` with every stop token."""
    settings = copy.deepcopy(get_hf_model(model.model).generation_config)
    stops = list(model.stop_token_ids)
    if stops:
        settings.eos_token_id = stops if len(stops) > 1 else stops[0]
    settings.pad_token_id = model.tokenizer.pad_token_id
    # Not save_pretrained: it refuses settings that many base models ship, such as a
    # temperature without do_sample.
    text = json.dumps(settings.to_diff_dict(), indent=2, sort_keys=True, default=str)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
