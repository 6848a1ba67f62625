"""Llama 4, ERNIE 4.5 and Hunyuan with experts; each says what is particular to it.

What llama.cpp reads and computes is in ``src/models/NAME.cpp``, what its converter writes in
``conversion/llama.py``, ``ernie.py`` and ``hunyuan.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.dense import check_absent, describe_alpha
from qlora_kit.exporters.gguf.families.family import Config, Description, Family
from qlora_kit.exporters.gguf.families.transforms import (
    first_half,
    keep,
    second_half,
    transpose,
)

if TYPE_CHECKING:
    import torch

__all__ = ["ROUTED"]

_QKV: Final = ("q_proj", "k_proj", "v_proj")

#: What src/models/llama4.cpp has as numbers, not as keys of the file.
_LLAMA4: Final[Mapping[str, object]] = {
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_chunk_size": 8192,
}


def _describe_llama4(config: Config, description: Description) -> None:
    check_absent(config, "llama4", **_LLAMA4)
    rotates = [int(bool((i + 1) % 4)) for i in range(config.layers)]
    stated = config.get("no_rope_layers")
    types = config.get("layer_types")
    chunked = [int(kind == "chunked_attention") for kind in types] if types else rotates
    if (stated is not None and [int(one) for one in stated] != rotates) or chunked != rotates:
        raise UnsupportedModelError(
            "llama.cpp's llama4 has full attention without rotary embeddings in every fourth layer "
            f"and in no other; here layer_types is {types} and no_rope_layers {stated}."
        )
    experts = int(config.require("num_local_experts"))
    # By the number of experts llama.cpp tells Maverick from Scout, which normalizes.
    check_absent(config, "llama4", use_qk_norm=experts != 128)
    step = int(config.get("interleave_moe_layer_step", 1))
    routed = config.get("moe_layers")
    wanted = list(range(step - 1, config.layers, step))
    if routed is not None and list(routed) != wanted:
        raise UnsupportedModelError(
            f"moe_layers is {routed}; llama.cpp has experts in every {step}. layer: {wanted}."
        )
    description.metadata |= {
        "feed_forward_length": int(config.require("intermediate_size_mlp")),
        "expert_feed_forward_length": int(config.require("intermediate_size")),
        "expert_count": experts,
        "expert_used_count": int(config.require("num_experts_per_tok")),
        "interleave_moe_layer_step": step,
    }


def _gate_of_inputs(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """(experts, inputs, gates and ups) -> the gates, (experts, outputs, inputs)."""
    return first_half(transpose(weight, config), config)


def _up_of_inputs(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return second_half(transpose(weight, config), config)


def _describe_ernie(config: Config, description: Description) -> None:
    start, step = config.get("moe_layer_start_index", 1), config.get("moe_layer_interval", 1)
    last = config.get("moe_layer_end_index", -1)
    if last not in (-1, config.layers - 1):
        raise UnsupportedModelError(
            f"moe_layer_end_index is {last}; llama.cpp has experts up to the last layer, "
            f"{config.layers - 1}."
        )
    width, shared = (
        int(config.require("moe_intermediate_size")),
        config.get("moe_num_shared_experts"),
    )
    description.metadata |= {
        "expert_count": int(config.require("moe_num_experts")),
        "expert_used_count": int(config.require("moe_k")),
        "expert_feed_forward_length": width,
        "interleave_moe_layer_step": int(step),
        "leading_dense_block_count": int(start),
    }
    if shared is not None:
        description.metadata["expert_shared_count"] = int(shared)
    if shared:
        # The converter divides the dense width by the key heads, which is the same in what is
        # published.
        description.metadata["expert_shared_feed_forward_length"] = width * int(shared)


def _one_of(config: Config, key: str, default: int) -> int:
    """An entry that may be stated layer by layer, all alike."""
    value: Any = config.get(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) > 1:
        raise UnsupportedModelError(
            f"{key} is {value}; llama.cpp wants all layers of 'hunyuan-moe' alike."
        )
    return int(values.pop())


def _describe_hunyuan_moe(config: Config, description: Description) -> None:
    width = int(config.require("intermediate_size"))
    description.metadata |= {
        "expert_count": _one_of(config, "num_experts", 1),
        "expert_used_count": _one_of(config, "moe_topk", 1),
        "expert_shared_feed_forward_length": width,
        "expert_feed_forward_length": _one_of(config, "moe_intermediate_size", width),
        "expert_shared_count": _one_of(config, "num_shared_expert", 1),
    }
    describe_alpha(config, description)


ROUTED: Final = (
    Family(
        "llama4_text",
        "llama4",
        rotary_kinds=("llama3",),
        default_theta=500000.0,
        splits={
            "feed_forward.experts.gate_up_proj": {
                "ffn_gate_exps.weight": _gate_of_inputs,
                "ffn_up_exps.weight": _up_of_inputs,
            },
            "feed_forward.experts.down_proj": {"ffn_down_exps.weight": transpose},
        },
        describe=_describe_llama4,
    ),
    Family(
        "ernie4_5_moe",
        "ernie4_5-moe",
        ties_by_default=True,
        biases=(*_QKV, "o_proj"),
        has_experts=True,
        default_theta=500000.0,
        splits={"e_score_correction_bias": {"exp_probs_b.bias": keep}},
        describe=_describe_ernie,
    ),
    Family(
        "hunyuan_v1_moe",
        "hunyuan-moe",
        has_experts=True,
        scales_by_alpha=True,
        describe=_describe_hunyuan_moe,
    ),
)
