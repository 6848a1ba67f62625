"""One decoder layer of the Llama family as a function of its tensors.

The same function serves every layer, so one compiled graph does too. It covers Llama,
Mistral, Qwen2 and Qwen3 layers; which models those are is decided in ``support``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.engines.native.fast.attention import attend
from qlora_kit.engines.native.fast.projection import project

__all__ = [
    "LayerShape",
    "LayerTensors",
    "Modules",
    "Projections",
    "decoder_layer",
    "rms_norm",
    "rotate",
]


class Projections(NamedTuple):
    """A group of projections with one input; fields as in :func:`projection.project`."""

    weights: list[Tensor]
    scales: list[Tensor]
    rows: list[int]
    blocksize: int
    quant_type: str
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None


class Modules(NamedTuple):
    """A group left to peft's own modules: dropout, DoRA, 8-bit weights, trained biases."""

    modules: Sequence[Any]


class LayerTensors(NamedTuple):
    """Everything a layer reads besides its input."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Projections | Modules
    out: Projections | Modules
    gate_up: Projections | Modules
    down: Projections | Modules


class LayerShape(NamedTuple):
    """Numbers that all layers of a model share."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    epsilon: float
    #: ``swiglu.swiglu`` where its kernels run, else ``None`` for the plain expression.
    gated: Callable[[Tensor], Tensor] | None = None


def decoder_layer(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    longest: Tensor,
    mask: Tensor | None,
    layer: LayerTensors,
    shape: LayerShape,
) -> Tensor:
    """Attention and feed-forward block with their residuals.

    Args:
        hidden: Shape ``(T, H)``.
        cos: Rotary cosines, shape ``(T, D)``.
        sin: Rotary sines, shape ``(T, D)``.
        bounds: See :func:`attention.attend`, like ``longest`` and ``mask``.
        longest: The same.
        mask: The same.
        layer: The layer's tensors.
        shape: The model's numbers.

    Returns:
        Shape ``(T, H)``.
    """
    tokens = hidden.shape[0]
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    x = rms_norm(hidden, layer.input_norm, shape.epsilon)
    q, k, v = _apply(x, layer.qkv).split([q_size, kv_size, kv_size], dim=1)
    # (T, heads * D) -> (T, heads, D): examples lie end to end, there is no batch dimension.
    q = q.reshape(tokens, shape.heads, shape.head_dim)
    k = k.reshape(tokens, shape.kv_heads, shape.head_dim)
    v = v.reshape(tokens, shape.kv_heads, shape.head_dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = rms_norm(q, layer.q_norm, shape.epsilon)
        k = rms_norm(k, layer.k_norm, shape.epsilon)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    attended = attend(q, k, v, bounds, longest, mask).reshape(tokens, q_size)
    hidden = hidden + _apply(attended, layer.out)
    x = rms_norm(hidden, layer.post_norm, shape.epsilon)
    both = _apply(x, layer.gate_up)
    if shape.gated is not None:
        return hidden + _apply(shape.gated(both), layer.down)
    gate, up = both.split([shape.intermediate, shape.intermediate], dim=1)
    return hidden + _apply(torch.nn.functional.silu(gate) * up, layer.down)


def _apply(x: Tensor, group: Projections | Modules) -> Tensor:
    if isinstance(group, Modules):
        return torch.cat([module(x[None])[0] for module in group.modules], dim=1)
    return project(x, *group)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalization over the last dimension."""
    # Rounded to the weight's dtype before the weight is applied, as transformers does.
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x``, shape ``(T, H, D)``, by ``cos`` and ``sin``, shape ``(T, D)``."""
    # RoPE (Su et al., arXiv:2104.09864) as transformers lays it out: dimension i turns with
    # i + D/2, not with its neighbour; cos and sin, (T, D), repeat their first half.
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
