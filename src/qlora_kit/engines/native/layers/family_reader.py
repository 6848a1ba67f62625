"""What a model in memory says of its family: shapes, windows, norms, projections.

The one place that knows transformers' modules by name; nothing is changed.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_kit.engines.native.layers.architectures import ACTIVATIONS
from qlora_kit.engines.native.layers.expert_layers import find_block
from qlora_kit.engines.native.layers.families import Family
from qlora_kit.engines.native.layers.layer import LayerShape, Norm

__all__ = [
    "GROUPS",
    "find_norms",
    "list_projections",
    "read_embedding_multiplier",
    "read_logit_scale",
    "read_logit_softcap",
    "read_norm",
    "read_norms",
    "read_shape",
    "read_windows",
]

#: A layer's groups of projections, as :class:`layer.LayerTensors` names them.
GROUPS = ("qkv", "out", "gate_up", "down")


def read_shape(decoder: Any, config: Any, family: Family) -> LayerShape:
    """What all layers of a decoder share."""
    attention = decoder.layers[0].self_attn
    norm = next(iter(find_norms(decoder.layers[0], family).values()))
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    parallel = family.parallel
    residual = 1.0 if family.residual is None else float(getattr(config, family.residual))
    softcap = config.attn_logit_softcapping if family.caps_attention else None
    heads = config.num_attention_heads
    return LayerShape(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=attention.head_dim,
        epsilon=float(epsilon),
        norm=family.norm,
        head_norms_over_all=family.head_norms_over == "all",
        head_norms_turned=family.head_norms_turned,
        turns_pairs=family.pairs,
        scale=float(attention.scaling),
        softcap=float(softcap or 0.0),
        activation=ACTIVATIONS[getattr(config, family.activation)],
        is_gated=family.is_gated,
        is_parallel=getattr(config, parallel) if isinstance(parallel, str) else parallel,
        residual=residual,
    )


def read_windows(decoder: Any, config: Any, family: Family) -> list[int]:
    """How far each layer sees, in tokens; 0 for as far as there is anything."""
    window = getattr(config, "sliding_window", None) or 0
    if not family.layer_windows:
        return [window] * len(decoder.layers)
    return [window if kind == "sliding_attention" else 0 for kind in config.layer_types]


def list_projections(layer: Any, family: Family) -> dict[str, tuple[Any, ...]]:
    """A layer's projections by group, peft's wrappers where there are any; experts aside."""
    attention = layer.self_attn
    found = {
        "qkv": tuple(getattr(attention, name) for name in family.qkv),
        "out": (getattr(attention, family.out),),
    }
    if find_block(layer) is None:
        found["gate_up"] = tuple(getattr(layer.mlp, name) for name in family.gate_up)
        found["down"] = (getattr(layer.mlp, family.down),)
    return found


def find_norms(layer: Any, family: Family) -> dict[str, Any]:
    """A layer's norm modules, by the names that :class:`layer.LayerTensors` gives them."""
    places = ("before_attention", "after_attention", "before_mlp", "after_mlp")
    named = zip(places, family.norms, strict=True)
    found = {place: getattr(layer, name, None) for place, name in named if name is not None}
    for place, name in zip(("q_norm", "k_norm"), family.head_norms, strict=True):
        found[place] = getattr(layer.self_attn, name, None)
    # An Identity stands for a norm that a model goes without.
    return {
        place: norm for place, norm in found.items()
        if norm is not None and not isinstance(norm, torch.nn.Identity)
    }  # fmt: skip


def read_norms(
    layer: Any, family: Family
) -> tuple[Norm | None, Norm | None, Norm | None, Norm | None, Norm | None, Norm | None]:
    """A layer's norms in the order of :class:`layer.LayerTensors`."""
    found = {place: read_norm(module) for place, module in find_norms(layer, family).items()}
    return (
        found.get("before_attention"), found.get("after_attention"), found.get("before_mlp"),
        found.get("after_mlp"), found.get("q_norm"), found.get("k_norm"),
    )  # fmt: skip


def read_norm(module: Any) -> Norm:
    """A norm's tensors."""
    if hasattr(module, "norms"):
        # StableLM has a module per head.
        return Norm(torch.stack([one.weight.detach() for one in module.norms]))
    bias = getattr(module, "bias", None)
    return Norm(_read_parameter(module.weight), None if bias is None else _read_parameter(bias))


def _read_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """One that trains gets its gradient from autograd."""
    return parameter if parameter.requires_grad else parameter.detach()


def read_embedding_multiplier(config: Any, family: Family) -> float:
    """What embeddings are multiplied with after their module."""
    return 1.0 if family.multiplier is None else float(getattr(config, family.multiplier))


def read_logit_scale(config: Any, family: Family) -> float:
    """What logits are multiplied with."""
    name = family.logit_scale
    if name is None:
        return 1.0
    value = float(getattr(config, name.removeprefix("/")))
    return 1.0 / value if name.startswith("/") else value


def read_logit_softcap(config: Any, family: Family) -> float:
    """What logits are soft-capped at; 0 for no cap."""
    return float(config.final_logit_softcapping or 0.0) if family.caps_logits else 0.0
