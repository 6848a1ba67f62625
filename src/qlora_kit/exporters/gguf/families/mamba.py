"""Families with Mamba 2 (arXiv:2405.21060) beside attention, or in its place.

What llama.cpp reads and computes is in ``src/models/granite-hybrid.cpp`` and ``falcon-h1.cpp``,
what its converter writes in ``conversion/granite.py`` and ``falcon_h1.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.dense import check_absent, describe_granite
from qlora_kit.exporters.gguf.families.family import Config, Description, Family, Transform
from qlora_kit.exporters.gguf.families.transforms import (
    ROTARY,
    first_half,
    keep,
    negate_exponential,
    second_half,
    squeeze_convolution,
)

if TYPE_CHECKING:
    import torch

__all__ = ["MAMBA"]

_QKV: Final = ("q_proj", "k_proj", "v_proj")

#: How long a context may be where nothing in a model counts positions, as the converter has it.
_NO_POSITIONS: Final = 2**20


def _as_column(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """One number for each head, as Mamba 1 had several."""
    return weight.unsqueeze(-1)


def _decay_column(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return _as_column(negate_exponential(weight, config), config)


def _group_norm(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """(channels,) -> (groups, channels of a group)."""
    return weight.reshape(int(config.require("mamba_n_groups")), -1)


_MIXER: Final[Mapping[str, Transform]] = {
    "mamba.conv1d.weight": squeeze_convolution,
    "mamba.norm.weight": _group_norm,
}
_MIXER_SPLITS: Final[Mapping[str, Mapping[str, Transform]]] = {
    "mamba.A_log": {"ssm_a": _decay_column},
    "mamba.D": {"ssm_d": _as_column},
    "mamba.dt_bias": {"ssm_dt.bias": keep},
}


def _read_number(value: Any) -> float:
    """A number of config.json, where transformers 5 writes infinity as an object."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _describe_mixer(config: Config, description: Description, inner: int) -> None:
    limit = [_read_number(end) for end in config.get("time_step_limit") or (0.0, math.inf)]
    if limit != [0.0, math.inf]:
        raise UnsupportedModelError(f"time_step_limit is {limit}; llama.cpp has no limit.")
    description.metadata |= {
        "ssm.conv_kernel": int(config.require("mamba_d_conv")),
        "ssm.state_size": int(config.require("mamba_d_state")),
        "ssm.group_count": int(config.require("mamba_n_groups")),
        "ssm.inner_size": inner,
        "ssm.time_step_rank": int(config.require("mamba_n_heads")),
    }


def _describe_granite_layers(config: Config, description: Description) -> None:
    """What Granite 4 has with and without Mamba layers."""
    describe_granite(config, description)
    shared = int(config.require("shared_intermediate_size"))
    experts = int(config.get("num_local_experts", 0))
    if experts:
        description.metadata |= {
            "expert_count": experts,
            "expert_used_count": int(config.require("num_experts_per_tok")),
            "expert_shared_feed_forward_length": shared,
        }
    else:
        description.metadata["feed_forward_length"] = shared
    description.metadata["rope.scaling.finetuned"] = config.get("position_embedding_type") == "rope"


def _describe_granite_hybrid(config: Config, description: Description) -> None:
    _describe_granite_layers(config, description)
    check_absent(config, "granitehybrid", mamba_n_groups=1, mamba_expand=2)
    _describe_mixer(config, description, 2 * int(config.require("hidden_size")))
    description.metadata["attention.head_count_kv"] = [
        config.kv_heads if attends else 0 for attends in _list_attending(config)
    ]
    if not description.metadata["rope.scaling.finetuned"]:
        description.metadata["context_length"] = _NO_POSITIONS


def _list_attending(config: Config) -> list[bool]:
    """Which layers attend; transformers 5 calls "attention" and "mamba" by other names."""
    types = config.require("layer_types")
    return [kind in ("attention", "full_attention") for kind in types]


_GRANITE_EXPERTS: Final[Mapping[str, Mapping[str, Transform]]] = {
    "block_sparse_moe.input_linear.weight": {
        "ffn_gate_exps.weight": first_half,
        "ffn_up_exps.weight": second_half,
    },
    "block_sparse_moe.output_linear.weight": {"ffn_down_exps.weight": keep},
    "shared_mlp.input_linear.weight": {
        "ffn_gate_shexp.weight": first_half,
        "ffn_up_shexp.weight": second_half,
    },
    "shared_mlp.output_linear.weight": {"ffn_down_shexp.weight": keep},
}
_GRANITE_DENSE: Final[Mapping[str, Mapping[str, Transform]]] = {
    "shared_mlp.input_linear.weight": {
        "ffn_gate.weight": first_half,
        "ffn_up.weight": second_half,
    },
    "shared_mlp.output_linear.weight": {"ffn_down.weight": keep},
}


def _choose_granite(family: Family, config: Config) -> Family:
    """Without a Mamba layer it is one of the older architectures; without experts, dense."""
    has_experts = bool(config.get("num_local_experts", 0))
    family = replace(
        family,
        has_experts=has_experts,
        splits={**_MIXER_SPLITS, **(_GRANITE_EXPERTS if has_experts else _GRANITE_DENSE)},
    )
    if not all(_list_attending(config)):
        return family
    return replace(
        family,
        architecture="granitemoe" if has_experts else "granite",
        describe=_describe_granite_layers,
        block_tensors=("attn_norm", "attn_output", "ffn_norm"),
    )


def _scale(*keys: str) -> Transform:
    """A multiplication by entries of the configuration, which the file has in the weights."""

    def scale(weight: torch.Tensor, config: Config) -> torch.Tensor:
        for key in keys:
            weight = weight * float(config.get(key, 1.0))
        return weight

    return scale


def _scale_mlp(index: int) -> Transform:
    def scale(weight: torch.Tensor, config: Config) -> torch.Tensor:
        return weight * float(config.get("mlp_multipliers", (1.0, 1.0))[index])

    return scale


def _scale_mixer_inputs(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Each kind of row by its own: gates, inputs, what writes the state, what reads it, steps."""
    import torch

    inner = int(config.require("mamba_d_ssm"))
    state = int(config.require("mamba_n_groups")) * int(config.require("mamba_d_state"))
    heads = int(config.require("mamba_n_heads"))
    counts = torch.tensor([inner, inner, state, state, heads])
    multipliers = torch.tensor(list(config.get("ssm_multipliers", (1.0,) * 5)))
    rows = multipliers.repeat_interleave(counts).to(weight.device)
    weight = weight * float(config.get("ssm_in_multiplier", 1.0))
    return weight * rows.reshape(-1, *([1] * (weight.ndim - 1)))


def _describe_falcon_h1(config: Config, description: Description) -> None:
    if config.get("mamba_rms_norm", False):
        check_absent(config, "falcon-h1", mamba_norm_before_gate=False)
    check_absent(config, "falcon-h1", projectors_bias=False)
    own = {key: config.get(key, 1.0) for key in ("embedding_multiplier", "lm_head_multiplier")}
    if config.get("tie_word_embeddings", False) and len(set(own.values())) > 1:
        raise UnsupportedModelError(
            f"The head is tied to the embeddings and multiplied otherwise ({own}); llama.cpp has "
            "one matrix for both. Export with 'merged_16bit', or untie the head."
        )
    _describe_mixer(config, description, int(config.require("mamba_d_ssm")))


_FALCON_SCALES: Final[Mapping[str, Transform]] = {
    "feed_forward.down_proj.weight": _scale_mlp(1),
    "feed_forward.gate_proj.weight": _scale_mlp(0),
    "self_attn.k_proj.weight": _scale("key_multiplier", "attention_in_multiplier"),
    "self_attn.q_proj.weight": _scale("attention_in_multiplier"),
    "self_attn.v_proj.weight": _scale("attention_in_multiplier"),
    "self_attn.o_proj.weight": _scale("attention_out_multiplier"),
    "mamba.out_proj.weight": _scale("ssm_out_multiplier"),
    "mamba.in_proj.weight": _scale_mixer_inputs,
    "lm_head.weight": _scale("lm_head_multiplier"),
    "embed_tokens.weight": _scale("embedding_multiplier"),
}

MAMBA: Final = (
    Family(
        "granitemoehybrid",
        "granitehybrid",
        transforms={**ROTARY, **_MIXER},
        biases=(*_QKV, "o_proj", "conv1d"),
        describe=_describe_granite_hybrid,
        choose=_choose_granite,
        names={
            "model.layers.{bid}.block_sparse_moe.router": "blk.{bid}.ffn_gate_inp",
            "model.layers.{bid}.block_sparse_moe.router.layer": "blk.{bid}.ffn_gate_inp",
        },
        block_tensors=("attn_norm", "ffn_norm"),
    ),
    Family(
        "falcon_h1",
        "falcon-h1",
        transforms={**_MIXER, **_FALCON_SCALES},
        biases=("conv1d",),
        splits=_MIXER_SPLITS,
        describe=_describe_falcon_h1,
        block_tensors=("attn_norm", "attn_output", "ffn_down", "ssm_in", "ssm_out"),
    ),
)
