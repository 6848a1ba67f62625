"""Which architectures the fast path computes, told from a checkpoint's configuration alone.

Nothing heavy is imported: the choice of an engine asks here before any library is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["DECODERS", "find_architecture_obstacle", "find_model_obstacle"]

#: transformers' decoders whose layers are what ``layer.decoder_layer`` computes, by model type.
DECODERS: Final = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
}

#: Rotary embeddings that do not depend on the length of the batch.
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")


def find_model_obstacle(base: Any) -> str | None:
    """Why the fast path does not compute a model in memory, or ``None``; its adapters aside.

    Args:
        base: A transformers model, without peft around it.
    """
    decoder = type(getattr(base, "model", None))
    if decoder.__name__ not in DECODERS.values() or not decoder.__module__.startswith(
        "transformers.models."
    ):
        return f"{type(base).__name__} is not of the Llama family"
    return find_architecture_obstacle(base.config.to_dict())


def find_architecture_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why the fast path does not compute a model of this configuration, or ``None``.

    Args:
        config: What a ``config.json`` holds, or a transformers configuration as a dictionary.
    """
    model_type = config.get("model_type")
    if model_type not in DECODERS:
        return f"{model_type} is not of the Llama family"
    # What transformers takes where a file does not say.
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        return f"the activation is {activation}"
    if config.get("attention_dropout"):
        return f"attention_dropout={config['attention_dropout']}"
    if _has_window(config, model_type):
        return "the model attends through a sliding window"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        return f"rotary embeddings of type {rope_type!r}"
    return None


def _has_window(config: Mapping[str, Any], model_type: str) -> bool:
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return "sliding_attention" in layer_types
    # Older files say it as transformers' configurations of these families read it.
    if model_type == "mistral":
        return bool(config.get("sliding_window", 4096))
    return bool(
        config.get("use_sliding_window")
        and config.get("sliding_window", 4096)
        and config.get("num_hidden_layers", 32) > (config.get("max_window_layers") or 28)
    )
