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
from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.layer import Placement, attend_placed

__all__ = ["norm", "read_prompts", "row", "run_layers"]

#: Keys that a program of the attention kernel takes at once.
_KEYS = 64
#: Programs that attention aims at: enough for every multiprocessor, twice.
_PROGRAMS = 256


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """:func:`layer.rms_norm` of shape ``(T, H)`` as one kernel."""
    out = torch.empty_like(x)
    _launch_norm(x, None, weight, out, epsilon)
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
    epsilon = decoder.shape.epsilon
    for index, layer in enumerate(decoder.layers):
        tensors = layer.tensors
        x = _make_input(tensors.qkv, hidden)
        _launch_norm(hidden, delta, tensors.before_attention.weight, x, epsilon)
        qkv = _multiply(tensors.qkv, x)
        attended = _make_input(tensors.out, hidden)
        _attend(decoder, tensors, cache, index, qkv, positions, rotations.layers[index], attended)
        delta = _multiply(tensors.out, attended)
        x = _make_input(tensors.gate_up, hidden)
        _launch_norm(hidden, delta, tensors.before_mlp.weight, x, epsilon)
        both = _multiply(tensors.gate_up, x)
        x = _make_input(tensors.down, hidden)
        _launch_gate(both, x)
        delta = _multiply(tensors.down, x)
    assert delta is not None
    return hidden.add_(delta)


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
        qkv = tensors.qkv(norm(hidden, tensors.before_attention.weight, shape.epsilon))
        out = qkv.new_empty((len(qkv), heads + 2 * groups, shape.head_dim))
        rotation = (place.cos.contiguous(), place.sin.contiguous())
        _rotate(
            decoder, tensors, cache, index, qkv, positions, slots, rotation, out, is_prompt=True
        )
        q, k, v = out.split([heads, groups, groups], dim=1)
        attended = attend_placed(q, k, v, place, shape)
        hidden = hidden + tensors.out(attended.reshape(len(hidden), -1))
        both = tensors.gate_up(norm(hidden, tensors.before_mlp.weight, shape.epsilon))
        gated = both.new_empty((len(both), both.shape[1] // 2))
        _launch_gate(both, gated)
        hidden = hidden + tensors.down(gated)
    return hidden


def _rotate(
    decoder: Any,
    tensors: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    is_prompt: bool = False,
) -> None:
    shape = decoder.shape
    heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
    has_norm = tensors.q_norm is not None
    q_norm, k_norm = (tensors.q_norm.weight, tensors.k_norm.weight) if has_norm else (qkv, qkv)
    kernels.rotate_kernel[(qkv.shape[0], heads + 2 * groups)](
        qkv, q_norm, k_norm, *rotation, positions, slots, out, cache.keys[index],
        cache.values[index], cache.capacity, shape.epsilon, HEADS=heads, GROUPS=groups, SIZE=size,
        HALF=triton.next_power_of_2(size // 2), HAS_NORM=has_norm, IS_PROMPT=is_prompt,
        num_warps=1,
    )  # fmt: skip


def _attend(
    decoder: Any,
    tensors: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:
    shape = decoder.shape
    heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
    count, shared = qkv.shape[0], heads // groups
    keys, values = cache.keys[index], cache.values[index]
    q = qkv.new_empty((count, heads, size))
    _rotate(decoder, tensors, cache, index, qkv, positions, positions, rotation, q)
    splits = triton.next_power_of_2(max(1, _PROGRAMS // (count * groups)))
    splits = min(splits, triton.next_power_of_2(triton.cdiv(cache.capacity, _KEYS)))
    parts = torch.empty((count, groups, splits, shared, size), device=q.device)
    sums = torch.empty((count, groups, splits, shared, 2), device=q.device)
    wide = triton.next_power_of_2(max(size, 16))
    kernels.attention_kernel[(count, groups, splits)](
        q, keys, values, positions, parts, sums, cache.capacity, shape.scale,
        SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits, KEYS=_KEYS,
        ROWS=max(16, triton.next_power_of_2(shared)), num_warps=4,
    )  # fmt: skip
    kernels.combine_kernel[(count, heads)](
        parts, sums, out, out.stride(0), SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits,
        num_warps=1,
    )  # fmt: skip


def _launch_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, epsilon: float
) -> None:
    size = hidden.shape[1]
    kernels.norm_kernel[(hidden.shape[0],)](
        hidden, hidden if delta is None else delta, weight, out, size, out.stride(0), epsilon,
        HAS_DELTA=delta is not None, BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip


def _launch_gate(both: Tensor, out: Tensor) -> None:
    rows, size = both.shape[0], both.shape[1] // 2
    kernels.gate_kernel[(rows, triton.cdiv(size, 1024))](both, out, size, out.stride(0), BLOCK=1024)
