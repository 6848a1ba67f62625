"""Families whose layers carry a state instead of attending, in gated delta nets.

What llama.cpp reads and computes is in ``src/models/qwen3next.cpp``, ``qwen35.cpp`` and
``qwen35moe.cpp``, what its converter writes in ``conversion/qwen.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.dense import check_absent
from qlora_kit.exporters.gguf.families.family import Config, Description, Family, Transform
from qlora_kit.exporters.gguf.families.transforms import (
    add_one,
    keep,
    negate_exponential,
    squeeze_convolution,
)

if TYPE_CHECKING:
    import torch

__all__ = ["RECURRENT"]


def _describe_delta_net(config: Config, description: Description) -> None:
    """Gated delta nets (arXiv:2412.06464) between full attention."""
    width = int(config.require("linear_key_head_dim"))
    if config.require("linear_value_head_dim") != width:
        raise UnsupportedModelError(
            f"linear_value_head_dim is {config.get('linear_value_head_dim')}; llama.cpp takes it "
            f"to be linear_key_head_dim, {width}."
        )
    types = list(config.require("layer_types"))
    values = int(config.require("linear_num_value_heads"))
    description.metadata |= {
        "ssm.conv_kernel": int(config.require("linear_conv_kernel_dim")),
        "ssm.state_size": width,
        "ssm.group_count": int(config.require("linear_num_key_heads")),
        "ssm.time_step_rank": values,
        "ssm.inner_size": width * values,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in types],
        "full_attention_interval": int(config.get("full_attention_interval", 4)),
    }


def _describe_experts(config: Config, description: Description) -> None:
    check_absent(
        config,
        "qwen3next",
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    description.metadata |= {
        "expert_count": int(config.get("num_experts") or config.require("num_local_experts")),
        "expert_used_count": int(config.require("num_experts_per_tok")),
        "expert_feed_forward_length": int(config.require("moe_intermediate_size")),
        "expert_shared_feed_forward_length": int(config.require("shared_expert_intermediate_size")),
    }


def _describe_qwen3_next(config: Config, description: Description) -> None:
    _describe_delta_net(config, description)
    _describe_experts(config, description)


def _describe_qwen3_5(config: Config, description: Description) -> None:
    _describe_delta_net(config, description)
    # Of text, all of an image's coordinates are the one position.
    sections = list((config.get("rope_parameters") or {}).get("mrope_section") or (11, 11, 10))
    description.metadata["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]


def _describe_qwen3_5_moe(config: Config, description: Description) -> None:
    # Dense layers are no part of this family, and nothing states a width of them.
    _describe_qwen3_5(config, description)
    _describe_experts(config, description)


def _split_fused_inputs(config: Config) -> tuple[int, int, int]:
    """Key heads, and how many rows of each are queries or keys, and values or gates."""
    keys = int(config.require("linear_num_key_heads"))
    per_key = int(config.require("linear_num_value_heads")) // keys
    return (
        keys,
        int(config.require("linear_key_head_dim")),
        per_key * int(config.require("linear_value_head_dim")),
    )


def _take_qkv(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """All queries, all keys and all values, of rows that go key head by key head."""
    import torch

    heads, width, values = _split_fused_inputs(config)
    rows = weight.reshape(heads, 2 * (width + values), *weight.shape[1:])
    parts = rows.split((width, width, values, values), dim=1)[:3]
    return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])


def _take_gate(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """What the values are gated with, key head by key head."""
    heads, width, values = _split_fused_inputs(config)
    rows = weight.reshape(heads, 2 * (width + values), *weight.shape[1:])
    return rows[:, 2 * width + values :].reshape(-1, *weight.shape[1:])


def _tile_values(weight: torch.Tensor, config: Config, width: int) -> torch.Tensor:
    """Rows of value heads, from key head by key head to one of each key head in turn.

    ggml repeats keys as tiles, [K0, K1, K0, K1], where transformers repeats each in its place.
    """
    keys = int(config.require("linear_num_key_heads"))
    per_key = int(config.require("linear_num_value_heads")) // keys
    rest = weight.shape[1:]
    heads = weight.reshape(keys, per_key, width, *rest)
    return heads.transpose(0, 1).reshape(weight.shape)


def _tile_heads(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """One row for each head."""
    return _tile_values(weight, config, 1)


def _tile_rows(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """A head's width of rows for each."""
    return _tile_values(weight, config, int(config.require("linear_value_head_dim")))


def _tile_columns(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """A head's width of inputs for each; also of an adapter's first factor."""
    return _tile_rows(weight.transpose(0, -1), config).transpose(0, -1)


def _tile_after_keys(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Queries and keys as they are, then the values."""
    import torch

    heads, width, _ = _split_fused_inputs(config)
    start = 2 * heads * width
    return torch.cat([weight[:start], _tile_rows(weight[start:], config)])


def _tile_convolution(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return _tile_after_keys(squeeze_convolution(weight, config), config)


def _tile_decay(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return negate_exponential(_tile_heads(weight, config), config)


#: Norms are stored around zero, but for the one that is gated.
_NORMS: Final[Mapping[str, Transform]] = {
    "linear_attn.norm.weight": keep,
    "norm.weight": add_one,
}
_TILED: Final[Mapping[str, Transform]] = {
    **_NORMS,
    "in_proj_qkv.weight": _tile_after_keys,
    "in_proj_z.weight": _tile_rows,
    "in_proj_a.weight": _tile_heads,
    "in_proj_b.weight": _tile_heads,
    "conv1d.weight": _tile_convolution,
}
_TILED_SPLITS: Final[Mapping[str, Mapping[str, Transform]]] = {
    "linear_attn.A_log": {"ssm_a": _tile_decay},
    "linear_attn.dt_bias": {"ssm_dt.bias": _tile_heads},
}
_TILED_COLUMNS: Final[Mapping[str, Transform]] = {"linear_attn.out_proj.weight": _tile_columns}
_DELTA_BLOCK: Final = ("attn_norm", "post_attention_norm")
_FRACTION: Final = 0.25

RECURRENT: Final = (
    Family(
        "qwen3_next",
        "qwen3next",
        default_rotary_part=_FRACTION,
        has_experts=True,
        transforms={
            **_NORMS,
            "conv1d.weight": squeeze_convolution,
        },
        splits={
            "linear_attn.in_proj_qkvz.weight": {
                "attn_qkv.weight": _take_qkv,
                "attn_gate.weight": _take_gate,
            },
            "linear_attn.A_log": {"ssm_a": negate_exponential},
            "linear_attn.dt_bias": {"ssm_dt.bias": keep},
        },
        describe=_describe_qwen3_next,
        block_tensors=(*_DELTA_BLOCK, "ffn_gate_inp", "ffn_down_exps"),
    ),
    Family(
        "qwen3_5_text",
        "qwen35",
        default_rotary_part=_FRACTION,
        transforms=_TILED,
        splits=_TILED_SPLITS,
        columns=_TILED_COLUMNS,
        describe=_describe_qwen3_5,
        block_tensors=(*_DELTA_BLOCK, "ffn_down"),
    ),
    Family(
        "qwen3_5_moe_text",
        "qwen35moe",
        default_rotary_part=_FRACTION,
        has_experts=True,
        transforms=_TILED,
        splits=_TILED_SPLITS,
        columns=_TILED_COLUMNS,
        describe=_describe_qwen3_5_moe,
        block_tensors=(*_DELTA_BLOCK, "ffn_gate_inp", "ffn_down_exps"),
    ),
)
