"""One decoder layer as a function of its tensors.

The same function serves every layer of a model, so one compiled graph does too: what differs
between layers (a window, positions or none) is among the tensors. :class:`LayerShape` says what
differs between families; :mod:`families` lists those, :mod:`family_reader` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.attention import attend
from qlora_kit.engines.native.layers.dropped_projection import project_dropped
from qlora_kit.engines.native.layers.projection import project

__all__ = [
    "Attention",
    "Group",
    "LayerShape",
    "LayerTensors",
    "Modules",
    "Norm",
    "Placement",
    "Projections",
    "add_fed",
    "apply_norm",
    "attend_placed",
    "attention_block",
    "decoder_layer",
    "rms_norm",
    "rotate",
]

#: By the names that :data:`architectures.ACTIVATIONS` ends at.
_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}


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
    #: Rank and probability of each adapter where some drop numbers of their input in training.
    dropouts: tuple[tuple[int, float], ...] | None = None


class Modules(NamedTuple):
    """A group left to peft's own modules: DoRA, 8-bit weights, trained biases."""

    modules: Sequence[Any]


#: A group of projections; as a function, it computes them itself.
Group: TypeAlias = Projections | Modules | Callable[[Tensor], Tensor]


class Norm(NamedTuple):
    """A normalization's weight and bias, over its input's last dimension."""

    weight: Tensor
    bias: Tensor | None = None


class LayerTensors(NamedTuple):
    """What a layer reads besides its input and where its tokens stand.

    ``None`` stands where a family has no such norm. Norms of queries and keys have a weight per
    dimension of a head, per head and dimension, or of all heads together.
    """

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: Group
    out: Group
    #: ``None`` where experts follow the attention.
    gate_up: Group | None
    down: Group | None


class Placement(NamedTuple):
    """Where the tokens of a micro-batch stand, for one layer.

    Attributes:
        cos: Rotary cosines, shape ``(T, R)``, of the first ``R`` dimensions of a head.
        sin: Rotary sines, the same.
        stretch: What queries are multiplied with, shape ``(T, 1, 1)``, or ``None``.
        bounds: See :func:`attention.attend`, like all that follow.
        longest: The same.
        window: The same.
        mask: The same.
    """

    cos: Tensor
    sin: Tensor
    stretch: Tensor | None
    bounds: Tensor
    longest: Tensor
    window: Tensor
    mask: Tensor | None


class LayerShape(NamedTuple):
    """Numbers and choices that all layers of a model share.

    Attributes:
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        epsilon: What norms add to a variance.
        norm: How norms compute, see :func:`apply_norm`.
        head_norms_over_all: Whether queries' and keys' norms span all heads.
        head_norms_turned: Whether they come after the rotation.
        turns_pairs: Whether neighbouring dimensions rotate with each other.
        scale: What attention scores are multiplied with.
        softcap: What attention scores are soft-capped at; 0 for no cap.
        activation: The feed-forward block's.
        is_gated: Whether one half of it opens the other.
        is_parallel: Whether the feed-forward block reads what attention reads.
        residual: What a block's output is multiplied with before it is added.
        gated: ``swiglu.swiglu`` where its kernels run, else ``None`` for the plain expression.
    """

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    norm: str = "rms"
    head_norms_over_all: bool = False
    head_norms_turned: bool = False
    turns_pairs: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    activation: str = "silu"
    is_gated: bool = True
    is_parallel: bool = False
    residual: float = 1.0
    gated: Callable[[Tensor], Tensor] | None = None


#: Attention of queries, keys and values, ``(T, heads, D)`` each, to ``(T, H, D)``.
Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Placement", "LayerShape"], Tensor]


def attend_placed(q: Tensor, k: Tensor, v: Tensor, place: Placement, shape: LayerShape) -> Tensor:
    """Causal attention among the tokens that are computed."""
    return attend(
        q, k, v, place.bounds, place.longest, place.mask,
        window=place.window, scale=shape.scale, softcap=shape.softcap,
    )  # fmt: skip


def decoder_layer(
    hidden: Tensor,
    place: Placement,
    layer: LayerTensors,
    shape: LayerShape,
    attention: Attention = attend_placed,
) -> Tensor:
    """Attention and feed-forward block with their residuals.

    Args:
        hidden: Shape ``(T, H)``.
        place: Where the tokens stand.
        layer: The layer's tensors.
        shape: The model's numbers.
        attention: What the tokens look at.

    Returns:
        Shape ``(T, H)``.
    """
    x = apply_norm(hidden, layer.before_attention, shape)
    hidden = _add_attention(hidden, x, place, layer, shape, attention)
    if not shape.is_parallel:
        x = apply_norm(hidden, layer.before_mlp, shape)
    return add_fed(hidden, _feed(x, layer, shape), layer, shape)


def attention_block(
    hidden: Tensor,
    place: Placement,
    layer: LayerTensors,
    shape: LayerShape,
    attention: Attention = attend_placed,
) -> tuple[Tensor, Tensor]:
    """The first half of :func:`decoder_layer`, where experts follow; arguments as there.

    Returns:
        The sum so far, and what the experts read; both ``(T, H)``.
    """
    x = apply_norm(hidden, layer.before_attention, shape)
    hidden = _add_attention(hidden, x, place, layer, shape, attention)
    return hidden, apply_norm(hidden, layer.before_mlp, shape)


def add_fed(hidden: Tensor, fed: Tensor, layer: LayerTensors, shape: LayerShape) -> Tensor:
    """A layer's output, of the sum so far and of what its feed-forward block puts out."""
    return hidden + _scale(apply_norm(fed, layer.after_mlp, shape), shape)


def _add_attention(
    hidden: Tensor,
    x: Tensor,
    place: Placement,
    layer: LayerTensors,
    shape: LayerShape,
    attention: Attention,
) -> Tensor:
    q, k, v = _project_heads(x, place, layer, shape)
    attended = _apply(attention(q, k, v, place, shape).reshape(x.shape[0], -1), layer.out)
    attended = apply_norm(attended, layer.after_attention, shape)
    return hidden + _scale(attended, shape)


def _project_heads(
    x: Tensor, place: Placement, layer: LayerTensors, shape: LayerShape
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    q, k, v = _apply(x, layer.qkv).split([q_size, kv_size, kv_size], dim=1)
    if shape.head_norms_over_all:
        q, k = apply_norm(q, layer.q_norm, shape), apply_norm(k, layer.k_norm, shape)
    # (T, heads * D) -> (T, heads, D): examples lie end to end, there is no batch dimension.
    q = q.reshape(tokens, shape.heads, shape.head_dim)
    k = k.reshape(tokens, shape.kv_heads, shape.head_dim)
    v = v.reshape(tokens, shape.kv_heads, shape.head_dim)
    is_normed_apart = not shape.head_norms_over_all
    if is_normed_apart and not shape.head_norms_turned:
        q, k = apply_norm(q, layer.q_norm, shape), apply_norm(k, layer.k_norm, shape)
    q = rotate(q, place.cos, place.sin, in_pairs=shape.turns_pairs)
    k = rotate(k, place.cos, place.sin, in_pairs=shape.turns_pairs)
    if is_normed_apart and shape.head_norms_turned:
        q, k = apply_norm(q, layer.q_norm, shape), apply_norm(k, layer.k_norm, shape)
    if place.stretch is not None:
        q = q * place.stretch
    return q, k, v


def _feed(x: Tensor, layer: LayerTensors, shape: LayerShape) -> Tensor:
    assert layer.gate_up is not None
    assert layer.down is not None
    both = _apply(x, layer.gate_up)
    if shape.gated is not None:
        return _apply(shape.gated(both), layer.down)
    activation = _ACTIVATIONS[shape.activation]
    if not shape.is_gated:
        return _apply(activation(both), layer.down)
    gate, up = both.chunk(2, dim=1)
    return _apply(activation(gate) * up, layer.down)


def _scale(x: Tensor, shape: LayerShape) -> Tensor:
    return x if shape.residual == 1.0 else x * shape.residual


def _apply(x: Tensor, group: Group) -> Tensor:
    if isinstance(group, Modules):
        return torch.cat([module(x[None])[0] for module in group.modules], dim=1)
    if not isinstance(group, Projections):
        return group(x)
    down, up, dropouts = group.down, group.up, group.dropouts
    # Under no_grad a model is evaluated, and nothing is dropped.
    if dropouts is None or down is None or up is None or not torch.is_grad_enabled():
        return project(x, *group[:8])
    return project_dropped(x, *group[:6], down, up, dropouts)


def apply_norm(x: Tensor, norm: Norm | None, shape: LayerShape) -> Tensor:
    """A family's normalization of ``x`` over its last dimension; ``x`` itself without one.

    ``rms`` rounds before the weight is applied, ``rms_wide`` after, ``layer`` takes the mean off
    too and rounds last, and a weight may be stored less one: each as transformers does it.
    """
    if norm is None:
        return x
    if shape.norm == "rms":
        return rms_norm(x, norm.weight, shape.epsilon)
    wide = x if x.dtype == torch.float64 else x.float()
    if shape.norm in ("layer", "layer_plus_one"):
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + shape.epsilon)
    weight = norm.weight
    if shape.norm == "rms_plus_one":
        weight = 1.0 + weight.to(wide.dtype)
    elif shape.norm == "layer_plus_one":
        weight = weight + 1.0
    wide = weight * wide
    return (wide if norm.bias is None else wide + norm.bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalization over the last dimension."""
    # Rounded to the weight's dtype before the weight is applied, as transformers does.
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, in_pairs: bool = False) -> Tensor:
    """Rotary embedding of ``x``, shape ``(T, H, D)``, by ``cos`` and ``sin``, shape ``(T, R)``.

    The last ``D - R`` dimensions stay as they are. Where ``cos`` is wider than ``x``, the rotation
    is computed in its dtype and rounded once.
    """
    # RoPE (Su et al., arXiv:2104.09864) as transformers lays it out: dimension i turns with
    # i + R/2, not with its neighbour, and cos and sin repeat their first half; or in pairs.
    turned, rest = x.split([cos.shape[1], x.shape[2] - cos.shape[1]], dim=2)
    if in_pairs:
        across = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = cos.shape[1] // 2
        across = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = (turned * cos[:, None] + across * sin[:, None]).to(x.dtype)
    return turned if rest.shape[2] == 0 else torch.cat((turned, rest), dim=-1)
