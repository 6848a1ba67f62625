"""A decoding step of several answers, and what prompts share with it, through Triton.

Imported only where Triton runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qlora_kit.engines.native.decoding import batch_kernels as kernels
from qlora_kit.engines.native.decoding import row_step as row
from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.weights import DecodingWeights

__all__ = ["gate", "norm", "rotate_prompts", "row", "run_layers"]

#: Keys that a program of the attention kernel takes at once.
_KEYS = 64
#: Programs that attention aims at: enough for every multiprocessor, twice.
_PROGRAMS = 256


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """:func:`layer.rms_norm` of shape ``(T, H)`` as one kernel."""
    out = torch.empty_like(x)
    _launch_norm(x, None, weight, out, epsilon)
    return out


def gate(both: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate and up side by side, shape ``(T, 2 * I)``."""
    out = both.new_empty((both.shape[0], both.shape[1] // 2))
    _launch_gate(both, out)
    return out


def run_layers(
    decoder: Any,
    cache: KeyValueCache,
    hidden: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> Tensor:
    """All layers for one token of each of the first slots.

    Args:
        decoder: The :class:`decoder.Decoder`.
        cache: Read and written.
        hidden: Embeddings, contiguous, shape ``(B, H)``; overwritten.
        positions: int64, shape ``(B,)``.
        rotation: Cosines and sines of all positions, shape ``(C, D)`` each.

    Returns:
        Shape ``(B, H)``.
    """
    delta: Tensor | None = None
    for index, layer in enumerate(decoder.layers):
        x = _make_input(layer.qkv, hidden)
        _launch_norm(hidden, delta, layer.input_norm, x, decoder.epsilon)
        qkv = _multiply(layer.qkv, x)
        attended = _make_input(layer.out, hidden)
        _attend(decoder, layer, cache, index, qkv, positions, rotation, attended)
        delta = _multiply(layer.out, attended)
        x = _make_input(layer.gate_up, hidden)
        _launch_norm(hidden, delta, layer.post_norm, x, decoder.epsilon)
        both = _multiply(layer.gate_up, x)
        x = _make_input(layer.down, hidden)
        _launch_gate(both, x)
        delta = _multiply(layer.down, x)
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


def rotate_prompts(
    decoder: Any,
    layer: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Queries, keys and values of prompts; the latter two are in the cache as well.

    Args:
        decoder: The :class:`decoder.Decoder`.
        layer: One of its layers.
        cache: Written.
        index: The layer's number.
        qkv: Shape ``(T, N)``.
        positions: int64, shape ``(T,)``.
        slots: Whose token each is, the same.
        rotation: Cosines and sines of each, shape ``(T, D)``.

    Returns:
        Shapes ``(T, heads, D)``, ``(T, G, D)`` and the same.
    """
    heads, groups = decoder.heads, decoder.kv_heads
    out = qkv.new_empty((qkv.shape[0], heads + 2 * groups, decoder.head_dim))
    _rotate(decoder, layer, cache, index, qkv, positions, slots, rotation, out, is_prompt=True)
    return list(out.split([heads, groups, groups], dim=1))


def _rotate(
    decoder: Any,
    layer: Any,
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
    heads, groups, size = decoder.heads, decoder.kv_heads, decoder.head_dim
    has_norm = layer.q_norm is not None
    kernels.rotate_kernel[(qkv.shape[0], heads + 2 * groups)](
        qkv, layer.q_norm if has_norm else qkv, layer.k_norm if has_norm else qkv, *rotation,
        positions, slots, out, cache.keys[index], cache.values[index], cache.capacity,
        decoder.epsilon, HEADS=heads, GROUPS=groups, SIZE=size,
        HALF=triton.next_power_of_2(size // 2), HAS_NORM=has_norm, IS_PROMPT=is_prompt,
        num_warps=1,
    )  # fmt: skip


def _attend(
    decoder: Any,
    layer: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:
    heads, groups, size = decoder.heads, decoder.kv_heads, decoder.head_dim
    count, shared = qkv.shape[0], heads // groups
    keys, values = cache.keys[index], cache.values[index]
    q = qkv.new_empty((count, heads, size))
    _rotate(decoder, layer, cache, index, qkv, positions, positions, rotation, q)
    splits = triton.next_power_of_2(max(1, _PROGRAMS // (count * groups)))
    splits = min(splits, triton.next_power_of_2(triton.cdiv(cache.capacity, _KEYS)))
    parts = torch.empty((count, groups, splits, shared, size), device=q.device)
    sums = torch.empty((count, groups, splits, shared, 2), device=q.device)
    wide = triton.next_power_of_2(max(size, 16))
    kernels.attention_kernel[(count, groups, splits)](
        q, keys, values, positions, parts, sums, cache.capacity, float(size) ** -0.5,
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
