"""Which kind of attention a model's layers take."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from qlora_kit.engines.native.layers.attention import AttentionKind, choose_attention
from qlora_kit.engines.native.layers.capped_attention import find_kernel_obstacle
from qlora_kit.engines.native.layers.layer import LayerShape
from qlora_kit.errors import EngineError

__all__ = ["resolve_attention"]

logger = logging.getLogger(__name__)


def resolve_attention(
    asked: AttentionKind | Literal["auto"],
    device: torch.device,
    dtype: torch.dtype,
    shape: LayerShape,
) -> AttentionKind:
    """What was asked for, or what is best here.

    Args:
        asked: The plan's ``attention``.
        device: Where the model is.
        dtype: What it computes in.
        shape: The model's numbers.

    Raises:
        EngineError: When kernels were asked for that cannot be used.
    """
    kind = choose_attention(device, dtype, shape.head_dim)
    obstacle = None
    if shape.softcap and device.type == "cuda" and kind == "varlen":
        obstacle = find_kernel_obstacle(device, dtype, shape.heads, shape.kv_heads, shape.head_dim)
    if obstacle is None or asked == "mask":
        return kind if asked == "auto" else asked
    if asked == "varlen":
        raise EngineError(
            "plan asks for attention='varlen', and the kernels that cap attention scores as "
            f"this model does cannot be used: {obstacle}. Leave attention='auto'."
        )
    logger.warning(
        "Attention goes through a mask, slower and for fewer tokens at a time: the kernels for "
        "soft-capped scores cannot be used: %s.", obstacle,
    )  # fmt: skip
    return "mask"
