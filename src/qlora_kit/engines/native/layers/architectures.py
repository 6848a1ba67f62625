"""Which architectures the fast path computes, told from a checkpoint's configuration alone.

Nothing heavy is imported: the choice of an engine asks here before any library is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qlora_kit.engines.native.layers.families import FAMILIES, WRAPPERS, Family

__all__ = [
    "ACTIVATIONS",
    "find_architecture_obstacle",
    "find_decoder",
    "find_model_obstacle",
]

#: Names of activations, and the one of torch's functions that each stands for.
ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

#: Rotary embeddings by which the length of an example matters, see :mod:`positions`.
_BY_LENGTH: Final = ("longrope", "dynamic")

#: What is computed; the others depend on nothing but the position.
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", *_BY_LENGTH)


def find_decoder(base: Any) -> tuple[Any, Family] | None:
    """A model's decoder and its family, or ``None`` where there is no entry for it.

    Args:
        base: A transformers model, without peft around it.
    """
    body = getattr(base, "model", None)
    decoder = getattr(body, "language_model", body)
    config = getattr(base, "config", None)
    if decoder is None or config is None:
        return None
    family = FAMILIES.get(config.get_text_config().model_type)
    kind = type(decoder)
    if (
        family is None
        or kind.__name__ != family.decoder
        or not kind.__module__.startswith("transformers.models.")
    ):
        return None
    return decoder, family


def find_model_obstacle(base: Any) -> str | None:
    """Why the fast path does not compute a model in memory, or ``None``; its adapters aside.

    Args:
        base: A transformers model, without peft around it.
    """
    if find_decoder(base) is None:
        return f"{type(base).__name__} is of no family that it computes"
    return find_architecture_obstacle(base.config.to_dict())


def find_architecture_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why the fast path does not compute a model of this configuration, or ``None``.

    Args:
        config: What a ``config.json`` holds, or a transformers configuration as a dictionary.
    """
    model_type = config.get("model_type")
    if model_type in WRAPPERS:
        text = config.get("text_config") or {}
        if text.get("final_logit_softcapping"):
            # transformers' wrapper leaves the cap out, its text model does not.
            return f"final_logit_softcapping={text['final_logit_softcapping']} within {model_type}"
        config = {"model_type": WRAPPERS[model_type], **text}
        model_type = config["model_type"]
    family = FAMILIES.get(str(model_type))
    if family is None:
        return f"{model_type} is of no family that it computes"
    # Where a file does not say, transformers takes one that is computed.
    activation = config.get(family.activation)
    if activation and activation not in ACTIVATIONS:
        return f"the activation is {activation}"
    for name in ("attention_dropout", *family.dropouts):
        if config.get(name):
            return f"{name}={config[name]}"
    if config.get("use_bidirectional_attention"):
        return "tokens attend to later ones (use_bidirectional_attention)"
    return _find_rope_obstacle(config)


def _find_rope_obstacle(config: Mapping[str, Any]) -> str | None:
    ropes = _list_ropes(config)
    for rope in ropes:
        rope_type = _read_rope_type(rope)
        if config.get("model_type") == "phi3" and rope_type in ("su", "yarn"):
            rope_type = "longrope"  # as transformers reads Phi-3's older files
        if rope_type not in _ROPE_TYPES or (rope_type in _BY_LENGTH and len(ropes) > 1):
            return f"rotary embeddings of type {rope_type!r}"
    return None


def _list_ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of rotary embeddings: one, or one for each type of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [one for one in rope.values() if isinstance(one, Mapping)]
    return nested or [rope]


def _read_rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))
