"""Families of models with experts besides qwen3_moe; each says what is particular to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.dense import (
    check_absent,
    check_heads_alike,
    describe_granite,
)
from qlora_kit.exporters.gguf.families.family import Config, Description, Family, Transform
from qlora_kit.exporters.gguf.families.rope import read_rope
from qlora_kit.exporters.gguf.families.transforms import (
    ROTARY,
    first_half,
    keep,
    second_half,
    transpose,
)
from qlora_kit.exporters.gguf.families.windows import check_windows, note_sliding_window

if TYPE_CHECKING:
    import torch

__all__ = ["EXPERTS"]

_QKV: Final = ("q_proj", "k_proj", "v_proj")
_SIGMOID: Final = 2


def _count_experts(config: Config, description: Description, *entries: str) -> None:
    """How many there are and how many work on a token."""
    count = next((config.get(entry) for entry in entries if config.get(entry)), None)
    description.metadata |= {
        "expert_count": int(count or config.require(entries[0])),
        "expert_used_count": int(config.require("num_experts_per_tok")),
    }


def _describe_mixtral(config: Config, description: Description) -> None:
    _count_experts(config, description, "num_local_experts")
    note_sliding_window(config, description)


def _describe_granite_moe(config: Config, description: Description) -> None:
    describe_granite(config, description)
    _count_experts(config, description, "num_local_experts")


def _describe_olmoe(config: Config, description: Description) -> None:
    check_absent(config, "olmoe", norm_topk_prob=False, clip_qkv=None)
    check_heads_alike(config, "olmoe")
    _count_experts(config, description, "num_experts")


def _describe_qwen2_moe(config: Config, description: Description) -> None:
    check_absent(config, "qwen2moe", norm_topk_prob=False, decoder_sparse_step=1)
    if config.get("mlp_only_layers"):
        check_absent(config, "qwen2moe", mlp_only_layers=[])
    _count_experts(config, description, "num_experts")
    description.metadata |= {
        "expert_feed_forward_length": int(config.require("moe_intermediate_size")),
        "expert_shared_feed_forward_length": int(config.require("shared_expert_intermediate_size")),
    }
    note_sliding_window(config, description)


def _describe_gpt_oss(config: Config, description: Description) -> None:
    check_windows(config, [i % 2 == 0 for i in range(config.layers)])
    _count_experts(config, description, "num_local_experts")
    description.metadata |= {
        "attention.sliding_window": int(config.require("sliding_window")),
        "expert_feed_forward_length": int(config.require("intermediate_size")),
    }


def _even(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """The gate's outputs, of gate and up one after the other."""
    return weight[..., ::2]


def _odd(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """The up projection's outputs."""
    return weight[..., 1::2]


_GPT_OSS_SPLITS: Final[Mapping[str, Mapping[str, Transform]]] = {
    "experts.gate_up_proj": {
        "ffn_gate_exps.weight": lambda weight, config: _even(weight, config).transpose(-1, -2),
        "ffn_up_exps.weight": lambda weight, config: _odd(weight, config).transpose(-1, -2),
    },
    "experts.gate_up_proj_bias": {"ffn_gate_exps.bias": _even, "ffn_up_exps.bias": _odd},
    "experts.down_proj": {"ffn_down_exps.weight": transpose},
    "experts.down_proj_bias": {"ffn_down_exps.bias": keep},
    "self_attn.sinks": {"attn_sinks.weight": keep},
}


def _describe_grouped(config: Config, description: Description, architecture: str) -> None:
    """Experts of DeepSeek's kind: some layers dense, some experts shared, groups."""
    _count_experts(config, description, "n_routed_experts")
    width = int(config.require("moe_intermediate_size"))
    shared = int(config.get("n_shared_experts", 0))
    description.metadata |= {
        "expert_feed_forward_length": width,
        "expert_shared_count": shared,
        "leading_dense_block_count": int(config.get("first_k_dense_replace", 0)),
        "expert_weights_scale": float(config.get("routed_scaling_factor", 1.0)),
        "expert_weights_norm": bool(config.get("norm_topk_prob", False)),
        "expert_gating_func": _SIGMOID,
    }
    if int(config.get("n_group", 1)) > 1:
        description.metadata |= {
            "expert_group_count": int(config.get("n_group")),
            "expert_group_used_count": int(config.require("topk_group")),
        }


def _describe_glm4_moe(config: Config, description: Description) -> None:
    _describe_grouped(config, description, "glm4moe")


def _describe_dots1(config: Config, description: Description) -> None:
    _describe_grouped(config, description, "dots1")
    check_heads_alike(config, "dots1")
    note_sliding_window(config, description)


def _split_key_rows(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Of each head's rows those that make its keys, transposed: (heads, rank, key width)."""
    nope, value = int(config.require("qk_nope_head_dim")), int(config.require("v_head_dim"))
    rows = weight.reshape(config.heads, nope + value, -1)
    return rows[:, :nope].transpose(1, 2)


def _split_value_rows(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Of each head's rows those that make its values: (heads, value width, rank)."""
    nope, value = int(config.require("qk_nope_head_dim")), int(config.require("v_head_dim"))
    rows = weight.reshape(config.heads, nope + value, -1)
    return rows[:, nope:]


def _describe_latent_yarn(config: Config, description: Description) -> None:
    """YaRN in llama.cpp's deepseek2, which scales attention by what it calls the log multiplier."""
    rope = read_rope(config.values)
    if rope.kind != "yarn":
        return
    scale, all_dim = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    if not scale or scale != all_dim:
        raise UnsupportedModelError(
            f"YaRN with mscale={scale} and mscale_all_dim={all_dim}: llama.cpp computes equal ones "
            "only for deepseek2. Export with 'merged_16bit'."
        )
    # src/models/deepseek2.cpp makes up for the factor by itself; conversion/deepseek.py writes
    # a tenth "for legacy reasons".
    del description.metadata["rope.scaling.attn_factor"]
    description.metadata["rope.scaling.yarn_log_multiplier"] = 0.1 * float(all_dim)


def _describe_deepseek(config: Config, description: Description) -> None:
    """Multi-head latent attention (arXiv:2405.04434), as llama.cpp absorbs it."""
    _describe_grouped(config, description, "deepseek2")
    rank, rotary = int(config.require("kv_lora_rank")), int(config.require("qk_rope_head_dim"))
    is_v2 = config.get("model_type") == "deepseek_v2"
    if is_v2:
        check_absent(config, "deepseek2", topk_method="greedy", norm_topk_prob=False)
    description.metadata |= {
        "expert_gating_func": 1 if is_v2 else _SIGMOID,
        # One key for all heads, after absorption.
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotary,
        "attention.value_length": rank,
        "attention.key_length_mla": int(config.require("qk_nope_head_dim")) + rotary,
        "attention.value_length_mla": int(config.require("v_head_dim")),
        "rope.dimension_count": rotary,
    }
    _describe_latent_yarn(config, description)
    if config.get("q_lora_rank") is not None:
        description.metadata["attention.q_lora_rank"] = int(config.get("q_lora_rank"))


#: How granite's files have experts; in memory they are fused as others' are.
_GRANITE_SPLITS: Final[Mapping[str, Mapping[str, Transform]]] = {
    "block_sparse_moe.input_linear.weight": {
        "ffn_gate_exps.weight": first_half,
        "ffn_up_exps.weight": second_half,
    },
    "block_sparse_moe.output_linear.weight": {"ffn_down_exps.weight": keep},
}
_CORRECTION: Final[Mapping[str, Mapping[str, Transform]]] = {
    "mlp.gate.e_score_correction_bias": {"exp_probs_b.bias": keep},
}
_LATENT: Final[Mapping[str, Mapping[str, Transform]]] = {
    "kv_b_proj.weight": {
        "attn_k_b.weight": _split_key_rows,
        "attn_v_b.weight": _split_value_rows,
    }
}


EXPERTS: Final = (
    Family(
        "mixtral",
        "llama",
        transforms=ROTARY,
        rotary_kinds=("linear", "yarn"),
        has_experts=True,
        describe=_describe_mixtral,
    ),
    Family(
        "granitemoe",
        "granitemoe",
        transforms=ROTARY,
        has_experts=True,
        biases=(*_QKV, "o_proj"),
        describe=_describe_granite_moe,
        splits=_GRANITE_SPLITS,
        names={
            "model.layers.{bid}.block_sparse_moe.router": "blk.{bid}.ffn_gate_inp",
            "model.layers.{bid}.block_sparse_moe.router.layer": "blk.{bid}.ffn_gate_inp",
        },
    ),
    Family(
        "olmoe",
        "olmoe",
        has_experts=True,
        describe=_describe_olmoe,
    ),
    Family(
        "qwen2_moe",
        "qwen2moe",
        biases=_QKV,
        has_experts=True,
        rotary_kinds=("linear", "yarn"),
        describe=_describe_qwen2_moe,
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        biases=(*_QKV, "o_proj", "router"),
        rotary_kinds=("yarn",),
        rounds_yarn=True,
        default_theta=150000.0,
        splits=_GPT_OSS_SPLITS,
        describe=_describe_gpt_oss,
        block_tensors=("attn_norm", "attn_output", "post_attention_norm"),
    ),
    Family(
        "glm4_moe",
        "glm4moe",
        biases=_QKV,
        has_experts=True,
        splits=_CORRECTION,
        describe=_describe_glm4_moe,
        block_tensors=("attn_norm", "attn_output", "post_attention_norm"),
    ),
    Family(
        "dots1",
        "dots1",
        has_experts=True,
        splits=_CORRECTION,
        describe=_describe_dots1,
    ),
    Family(
        "deepseek_v2",
        "deepseek2",
        has_experts=True,
        rotary_kinds=("yarn",),
        splits=_LATENT,
        describe=_describe_deepseek,
    ),
    Family(
        "deepseek_v3",
        "deepseek2",
        has_experts=True,
        rotary_kinds=("yarn",),
        splits={**_CORRECTION, **_LATENT},
        describe=_describe_deepseek,
    ),
)
