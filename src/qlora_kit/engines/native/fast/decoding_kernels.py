"""Triton kernels of a decoding step of several answers: what lies between the matrix products.

A step reads every weight once and computes little; what costs besides is the number of kernels.
Those here join what torch does in several: normalization with the residual, rotation with the
writing of the cache, attention over the tokens there are (split as in Flash-Decoding, Dao et al.,
2023).

Imported only where Triton runs.
"""

# Triton reads capitals as constants, and its functions have no types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kit.engines.native.fast import decoding_row as row
from qlora_kit.engines.native.fast.decoding_weights import DecodingWeights
from qlora_kit.engines.native.fast.kv_cache import KeyValueCache

__all__ = ["gate", "norm", "rotate_prompts", "row", "run_layers"]

#: Keys that a program of the attention kernel takes at once.
_KEYS = 64
#: Programs that attention aims at: enough for every multiprocessor, twice.
_PROGRAMS = 256


@triton.jit
def _norm_kernel(
    hidden, delta, weight, out, size, stride, epsilon, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    kind = out.dtype.element_ty
    x = tl.load(hidden + row * size + column, mask, 0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + row * size + column, mask, 0.0).to(tl.float32)
        x = x.to(kind).to(tl.float32)
        tl.store(hidden + row * size + column, x.to(kind), mask)
    x = x * tl.rsqrt(tl.sum(x * x) / size + epsilon)
    scale = tl.load(weight + column, mask, 0.0).to(tl.float32)
    # Rounded before the weight, as transformers does.
    tl.store(out + row * stride + column, (x.to(kind).to(tl.float32) * scale).to(kind), mask)


@triton.jit
def _gate_kernel(both, out, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(both + 2 * row * size + column, mask, 0.0).to(tl.float32)
    up = tl.load(both + (2 * row + 1) * size + column, mask, 0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * stride + column, value.to(out.dtype.element_ty), mask)


@triton.jit
def _rotate_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    slots,
    q_out,
    keys,
    values,
    capacity,
    epsilon,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_PROMPT: tl.constexpr,
):
    """One head of one token: queries to ``q_out``, keys and values into the cache.

    Of prompts, keys and values go to ``q_out`` as well, where attention reads them.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = q_out.dtype.element_ty
    position = tl.load(positions + row)
    lane = tl.arange(0, HALF)
    mask = lane < SIZE // 2
    source = qkv + (row * (HEADS + 2 * GROUPS) + head) * SIZE
    first = tl.load(source + lane, mask, 0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2 + lane, mask, 0.0).to(tl.float32)
    if head < HEADS + GROUPS:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / SIZE + epsilon)
            weight = q_norm
            if head >= HEADS:
                weight = k_norm
            left = tl.load(weight + lane, mask, 0.0).to(tl.float32)
            right = tl.load(weight + SIZE // 2 + lane, mask, 0.0).to(tl.float32)
            first = ((first * scale).to(kind).to(tl.float32) * left).to(kind).to(tl.float32)
            second = ((second * scale).to(kind).to(tl.float32) * right).to(kind).to(tl.float32)
        # Both halves of cosines and sines are alike.
        turn = position
        if IS_PROMPT:
            turn = row
        c = tl.load(cos + turn * SIZE + lane, mask, 0.0).to(tl.float32)
        s = tl.load(sin + turn * SIZE + lane, mask, 0.0).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    slot = row
    if IS_PROMPT:
        slot = tl.load(slots + row)
        target = q_out + (row * (HEADS + 2 * GROUPS) + head) * SIZE
        tl.store(target + lane, first.to(kind), mask)
        tl.store(target + SIZE // 2 + lane, second.to(kind), mask)
    else:
        target = q_out + (row * HEADS + head) * SIZE
    if head >= HEADS + GROUPS:
        target = values + ((slot * GROUPS + head - HEADS - GROUPS) * capacity + position) * SIZE
    elif head >= HEADS:
        target = keys + ((slot * GROUPS + head - HEADS) * capacity + position) * SIZE
    tl.store(target + lane, first.to(kind), mask)
    tl.store(target + SIZE // 2 + lane, second.to(kind), mask)


@triton.jit
def _attention_kernel(
    q,
    keys,
    values,
    positions,
    parts,
    sums,
    capacity,
    scale,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A share of a key head's tokens for the ``SHARED`` query heads that read it."""
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    start = split * share
    end = tl.minimum(start + share, length)
    head, lane = tl.arange(0, ROWS), tl.arange(0, WIDE)
    here = (head[:, None] < SHARED) & (lane[None, :] < SIZE)
    base = row * groups + group
    query = tl.load(q + (base * SHARED + head[:, None]) * SIZE + lane[None, :], here, 0.0)
    most = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDE), tl.float32)
    for begin in range(start, end, KEYS):
        at = begin + tl.arange(0, KEYS)
        inside = (at[:, None] < end) & (lane[None, :] < SIZE)
        place = (base * capacity + at[:, None]) * SIZE + lane[None, :]
        key = tl.load(keys + place, inside, 0.0)
        value = tl.load(values + place, inside, 0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(at[None, :] < end, score, -1e30)
        new = tl.maximum(most, tl.max(score, 1))
        chance = tl.exp(score - new[:, None])
        fade = tl.exp(most - new)
        total = total * fade + tl.sum(chance, 1)
        out = out * fade[:, None] + tl.dot(chance.to(value.dtype), value, input_precision="ieee")
        most = new
    place = (base * SPLITS + split) * SHARED + head
    tl.store(parts + place[:, None] * SIZE + lane[None, :], out, here)
    tl.store(sums + 2 * place, most, head < SHARED)
    tl.store(sums + 2 * place + 1, total, head < SHARED)


@triton.jit
def _combine_kernel(
    parts,
    sums,
    out,
    stride,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The shares of one query head, each scaled to the largest score."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    base = row * (heads // SHARED) + head // SHARED
    split, lane = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    place = (base * SPLITS + split) * SHARED + head % SHARED
    most, total = tl.load(sums + 2 * place), tl.load(sums + 2 * place + 1)
    weight = tl.exp(most - tl.max(most))
    inside = (lane[None, :] < SIZE) & (total[:, None] > 0)
    part = tl.load(parts + place[:, None] * SIZE + lane[None, :], inside, 0.0)
    value = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight)
    target = out + row * stride + head * SIZE + lane
    tl.store(target, value.to(out.dtype.element_ty), lane < SIZE)


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
    _rotate_kernel[(qkv.shape[0], heads + 2 * groups)](
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
    _attention_kernel[(count, groups, splits)](
        q, keys, values, positions, parts, sums, cache.capacity, float(size) ** -0.5,
        SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits, KEYS=_KEYS,
        ROWS=max(16, triton.next_power_of_2(shared)), num_warps=4,
    )  # fmt: skip
    _combine_kernel[(count, heads)](
        parts, sums, out, out.stride(0), SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits,
        num_warps=1,
    )  # fmt: skip


def _launch_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, epsilon: float
) -> None:
    size = hidden.shape[1]
    _norm_kernel[(hidden.shape[0],)](
        hidden, hidden if delta is None else delta, weight, out, size, out.stride(0), epsilon,
        HAS_DELTA=delta is not None, BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip


def _launch_gate(both: Tensor, out: Tensor) -> None:
    rows, size = both.shape[0], both.shape[1] // 2
    _gate_kernel[(rows, triton.cdiv(size, 1024))](both, out, size, out.stride(0), BLOCK=1024)
