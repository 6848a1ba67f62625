"""A decoding step of several answers, and what prompts share with it, through Triton.

Imported only where Triton runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from qlora_kit.engines.native.decoding import batch_kernels as kernels
from qlora_kit.engines.native.decoding import row_step as row
from qlora_kit.engines.native.decoding.kernel_parts import ACTIVATIONS, NORMS, shape_heads
from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.layer import LayerShape, Norm, Placement, attend_placed
from qlora_kit.engines.native.layers.positions import Rotation

__all__ = ["norm", "read_prompts", "row", "run_layers"]

#: Keys that a program of the attention kernel takes at once.
_KEYS = 64
#: Programs that attention aims at: enough for every multiprocessor, twice.
_PROGRAMS = 256


def norm(x: Tensor, weight: Norm | None, shape: LayerShape) -> Tensor:
    """:func:`layer.apply_norm` of shape ``(T, H)`` as one kernel."""
    if weight is None:
        return x
    out = torch.empty_like(x)
    _launch_norm(x, None, weight, out, shape)
    return out


def run_layers(
    decoder: Any,
    cache: KeyValueCache,
    hidden: Tensor,
    positions: Tensor,
    rotations: Any,
) -> Tensor:
    """All layers for one token of each of the first slots.

    Args:
        decoder: The :class:`decoder.Decoder`.
        cache: Read and written.
        hidden: Embeddings, contiguous, shape ``(B, H)``; overwritten.
        positions: int64, shape ``(B,)``.
        rotations: The :class:`decoder.Rotations` of the cache's room.

    Returns:
        Shape ``(B, H)``.
    """
    delta: Tensor | None = None
    shape = decoder.shape
    for index, layer in enumerate(decoder.layers):
        tensors = layer.tensors
        x = _make_input(tensors.qkv, hidden)
        _launch_norm(hidden, delta, tensors.before_attention, x, shape)
        qkv = _multiply(tensors.qkv, x)
        attended = _make_input(tensors.out, hidden)
        _attend(decoder, layer, cache, index, qkv, positions, rotations, attended)
        delta = _multiply(tensors.out, attended)
        _norm_after(delta, tensors.after_attention, shape)
        if layer.experts is not None:
            x = torch.empty_like(hidden)
            _launch_norm(hidden, delta, tensors.before_mlp, x, shape)
            delta = layer.experts.answer(x)
        else:
            x = _make_input(tensors.gate_up, hidden)
            _launch_norm(hidden, delta, tensors.before_mlp, x, shape)
            both = _multiply(tensors.gate_up, x)
            x = _make_input(tensors.down, hidden)
            _launch_gate(both, x, shape)
            delta = _multiply(tensors.down, x)
        _norm_after(delta, tensors.after_mlp, shape)
    assert delta is not None
    return hidden.add_(delta if shape.residual == 1.0 else delta * shape.residual)


def _norm_after(delta: Tensor, weight: Norm | None, shape: LayerShape) -> None:
    """Normalize what a block puts out, where the family does."""
    if weight is not None:
        _launch_norm(delta, None, weight, delta, shape)


def _make_input(weights: DecodingWeights, like: Tensor) -> Tensor:
    """Room for ``[x, down @ x]``, shape ``(B, K + R)``."""
    return like.new_empty((like.shape[0], weights.group.columns + weights.rank))


def _multiply(weights: DecodingWeights, x: Tensor) -> Tensor:
    """A group's products, contiguous, shape ``(B, N)``; fills in ``x``'s last ``R`` columns."""
    group, columns = weights.group, weights.group.columns
    if weights.down is not None:
        torch.mm(x[:, :columns], weights.down.T, out=x[:, columns:])
    if weights.whole is not None:
        return torch.nn.functional.linear(x, weights.whole, group.bias)
    low = None if weights.down is None else x[:, columns:]
    return weights.multiply_stored(x[:, :columns], low)


def read_prompts(
    decoder: Any,
    cache: KeyValueCache,
    hidden: Tensor,
    positions: Tensor,
    slots: Tensor,
    places: Sequence[Placement],
) -> Tensor:
    """All layers for prompts laid end to end, whose keys and values go into the cache.

    Args:
        decoder: The :class:`decoder.Decoder`.
        cache: Written.
        hidden: Embeddings, shape ``(T, H)``.
        positions: int64, shape ``(T,)``.
        slots: Whose token each is, the same.
        places: Where they stand, for every layer.

    Returns:
        Shape ``(T, H)``.
    """
    shape = decoder.shape
    heads, groups = shape.heads, shape.kv_heads
    for index, (layer, place) in enumerate(zip(decoder.layers, places, strict=True)):
        tensors = layer.tensors
        qkv = tensors.qkv(norm(hidden, tensors.before_attention, shape))
        out = qkv.new_empty((len(qkv), heads + 2 * groups, shape.head_dim))
        turn = Rotation(place.cos.contiguous(), place.sin.contiguous())
        _rotate(
            decoder, tensors, cache, index, qkv, positions, slots, turn, place.stretch, out,
            is_prompt=True,
        )  # fmt: skip
        q, k, v = out.split([heads, groups, groups], dim=1)
        attended = attend_placed(q, k, v, place, shape)
        delta = norm(tensors.out(attended.reshape(len(hidden), -1)), tensors.after_attention, shape)
        hidden = hidden + _scale(delta, shape)
        x = norm(hidden, tensors.before_mlp, shape)
        if layer.experts is not None:
            delta, _ = layer.experts(x, None)
        else:
            both = tensors.gate_up(x)
            gated = both.new_empty((len(both), tensors.down.group.columns))
            _launch_gate(both, gated, shape)
            delta = tensors.down(gated)
        hidden = hidden + _scale(norm(delta, tensors.after_mlp, shape), shape)
    return hidden


def _scale(delta: Tensor, shape: LayerShape) -> Tensor:
    return delta if shape.residual == 1.0 else delta * shape.residual


def _rotate(
    decoder: Any,
    tensors: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    turn: Rotation,
    stretch: Tensor | None,
    out: Tensor,
    *,
    is_prompt: bool = False,
) -> None:
    shape = decoder.shape
    heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
    has_norm = tensors.q_norm is not None
    q_norm, k_norm = (tensors.q_norm.weight, tensors.k_norm.weight) if has_norm else (qkv, qkv)
    kernels.rotate_kernel[(qkv.shape[0], heads + 2 * groups)](
        qkv, q_norm, k_norm, *turn, qkv if stretch is None else stretch, positions, slots, out,
        cache.keys[index], cache.values[index], cache.capacity, shape.epsilon, HEADS=heads,
        GROUPS=groups, SIZE=size,
        HALF=triton.next_power_of_2(size // 2), HAS_NORM=has_norm, IS_PROMPT=is_prompt,
        STRETCHES=stretch is not None, **shape_heads(shape, turn.cos.shape[1]),
        num_warps=1,
    )  # fmt: skip


def _attend(
    decoder: Any,
    layer: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    rotations: Any,
    out: Tensor,
) -> None:
    shape = decoder.shape
    heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
    count, shared = qkv.shape[0], heads // groups
    keys, values = cache.keys[index], cache.values[index]
    q = qkv.new_empty((count, heads, size))
    _rotate(
        decoder, layer.tensors, cache, index, qkv, positions, positions, rotations.layers[index],
        rotations.stretch, q,
    )  # fmt: skip
    splits = triton.next_power_of_2(max(1, _PROGRAMS // (count * groups)))
    splits = min(splits, triton.next_power_of_2(triton.cdiv(cache.capacity, _KEYS)))
    parts = torch.empty((count, groups, splits, shared, size), device=q.device)
    sums = torch.empty((count, groups, splits, shared, 2), device=q.device)
    wide = triton.next_power_of_2(max(size, 16))
    kernels.attention_kernel[(count, groups, splits)](
        q, keys, values, positions, parts, sums, cache.capacity, shape.scale,
        shape.softcap, layer.window or cache.capacity, CAPS=bool(shape.softcap),
        SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits, KEYS=_KEYS,
        ROWS=max(16, triton.next_power_of_2(shared)), num_warps=4,
    )  # fmt: skip
    kernels.combine_kernel[(count, heads)](
        parts, sums, out, out.stride(0), SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits,
        num_warps=1,
    )  # fmt: skip


def _launch_norm(
    hidden: Tensor, delta: Tensor | None, weight: Norm | None, out: Tensor, shape: LayerShape
) -> None:
    size = hidden.shape[1]
    kernels.norm_kernel[(hidden.shape[0],)](
        hidden, hidden if delta is None else delta, hidden if weight is None else weight.weight,
        out, size, out.stride(0), shape.epsilon, shape.residual, HAS_DELTA=delta is not None,
        SCALES=shape.residual != 1.0, NORM=0 if weight is None else NORMS[shape.norm],
        BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip


def _launch_gate(both: Tensor, out: Tensor, shape: LayerShape) -> None:
    rows, size = both.shape[0], both.shape[1] // (2 if shape.is_gated else 1)
    kernels.gate_kernel[(rows, triton.cdiv(size, 1024))](
        both, out, size, out.stride(0), ACTIVATION=ACTIVATIONS[shape.activation],
        GATED=shape.is_gated, BLOCK=1024,
    )  # fmt: skip
