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

import triton
import triton.language as tl

from qlora_kit.engines.native.decoding.kernel_parts import (
    activate,
    cap,
    halve,
    normalize,
    read_turn,
)

__all__ = ["attention_kernel", "combine_kernel", "gate_kernel", "norm_kernel", "rotate_kernel"]


@triton.jit
def norm_kernel(
    hidden,
    delta,
    weight,
    out,
    size,
    stride,
    epsilon,
    residual,
    HAS_DELTA: tl.constexpr,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row, added to its residual first where there is one, and normalized where it is."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    kind = out.dtype.element_ty
    x = tl.load(hidden + row * size + column, mask, 0.0).to(tl.float32)
    if HAS_DELTA:
        more = tl.load(delta + row * size + column, mask, 0.0).to(tl.float32)
        if SCALES:
            more = (more * residual).to(kind).to(tl.float32)
        x = (x + more).to(kind).to(tl.float32)
        tl.store(hidden + row * size + column, x.to(kind), mask)
    if NORM > 0:
        scale = tl.load(weight + column, mask, 0.0).to(tl.float32)
        x = normalize(x, tl.rsqrt(tl.sum(x * x) / size + epsilon), scale, NORM, kind)
    tl.store(out + row * stride + column, x.to(kind), mask)


@triton.jit
def gate_kernel(
    both,
    out,
    size,
    stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``activation(gate) * up`` of a row's columns; or the activation alone."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    if GATED:
        gate = tl.load(both + 2 * row * size + column, mask, 0.0).to(tl.float32)
        up = tl.load(both + (2 * row + 1) * size + column, mask, 0.0).to(tl.float32)
        value = activate(gate, ACTIVATION) * up
    else:
        gate = tl.load(both + row * size + column, mask, 0.0).to(tl.float32)
        value = activate(gate, ACTIVATION)
    tl.store(out + row * stride + column, value.to(out.dtype.element_ty), mask)


@triton.jit
def rotate_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    stretch,
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
    NORM: tl.constexpr,
    TURNS: tl.constexpr,
    PAIRS: tl.constexpr,
    STRETCHES: tl.constexpr,
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
    one, other = halve(lane, SIZE, TURNS, PAIRS)
    first = tl.load(source + one, mask, 0.0).to(tl.float32)
    second = tl.load(source + other, mask, 0.0).to(tl.float32)
    if head < HEADS + GROUPS:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / SIZE + epsilon)
            weight = q_norm
            if head >= HEADS:
                weight = k_norm
            left = tl.load(weight + one, mask, 0.0).to(tl.float32)
            right = tl.load(weight + other, mask, 0.0).to(tl.float32)
            first = normalize(first, scale, left, NORM, kind).to(kind).to(tl.float32)
            second = normalize(second, scale, right, NORM, kind).to(kind).to(tl.float32)
        turn = position
        if IS_PROMPT:
            turn = row
        c, s = read_turn(cos, sin, turn, lane, TURNS, PAIRS)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
        if STRETCHES:  # noqa: SIM102 - known when compiling, the other is not
            if head < HEADS:
                more = tl.load(stretch + turn).to(tl.float32)
                first = first.to(kind).to(tl.float32) * more
                second = second.to(kind).to(tl.float32) * more
    slot = row
    if IS_PROMPT:
        slot = tl.load(slots + row)
        target = q_out + (row * (HEADS + 2 * GROUPS) + head) * SIZE
        tl.store(target + one, first.to(kind), mask)
        tl.store(target + other, second.to(kind), mask)
    else:
        target = q_out + (row * HEADS + head) * SIZE
    if head >= HEADS + GROUPS:
        target = values + ((slot * GROUPS + head - HEADS - GROUPS) * capacity + position) * SIZE
    elif head >= HEADS:
        target = keys + ((slot * GROUPS + head - HEADS) * capacity + position) * SIZE
    tl.store(target + one, first.to(kind), mask)
    tl.store(target + other, second.to(kind), mask)


@triton.jit
def attention_kernel(
    q,
    keys,
    values,
    positions,
    parts,
    sums,
    capacity,
    scale,
    softcap,
    window,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CAPS: tl.constexpr,
):
    """A share of a key head's tokens for the ``SHARED`` query heads that read it."""
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    seen = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - seen, SPLITS), KEYS) * KEYS
    start = seen + split * share
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
        score = cap(score, softcap, CAPS)
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
def combine_kernel(
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
