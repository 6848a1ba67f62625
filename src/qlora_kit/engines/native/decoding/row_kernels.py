"""Triton kernels of a step for one answer: what makes the inputs of its products.

A step reads each weight once and computes little, so every kernel's start counts. A layer is nine:
those here also multiply their share of an input with the LoRA A matrices, and leave the shares to
the product (:mod:`row_products`).

Imported only where Triton runs.
"""

# Triton reads capitals as constants, and its functions have no types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qlora_kit.engines.native.decoding.kernel_parts import (
    activate,
    cap,
    halve,
    normalize,
    read_turn,
)

__all__ = [
    "RANKS",
    "add_kernel",
    "attention_kernel",
    "combine_kernel",
    "enter",
    "gate_kernel",
    "norm_kernel",
]

#: Ranks of the adapters that are taken at once.
RANKS = tl.constexpr(32)


@triton.jit
def enter(EARLY: tl.constexpr):
    """Let the next kernel start its reading of weights, and wait for the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _place(column, size, EIGHTS: tl.constexpr):
    """Where an input's column lies: in order, or every eighth together."""
    if EIGHTS:
        return (column % 8) * (size // 8) + column // 8
    return column


@triton.jit
def _store_shares(x, down, shares, size, column, inside, rank, RANK: tl.constexpr):
    """This program's share of ``down @ x``."""
    program = tl.program_id(0)
    for start in tl.static_range(0, RANK, RANKS):
        r = start + tl.arange(0, RANKS)
        here = (r < rank)[:, None] & inside[None, :]
        part = tl.load(down + r[:, None] * size + column[None, :], here, 0.0).to(tl.float32)
        tl.store(shares + program * rank + r, tl.sum(part * x[None, :], 1), r < rank)


@triton.jit
def norm_kernel(
    hidden,
    weight,
    down,
    out,
    shares,
    size,
    rank,
    epsilon,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    EIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``BLOCK`` columns of a row, normalized where it is; each program reads all of it then."""
    enter(EARLY)
    kind = out.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(hidden + column, inside, 0.0).to(tl.float32)
    if NORM > 0:
        everything = tl.arange(0, WHOLE)
        row = tl.load(hidden + everything, everything < size, 0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(row * row) / size + epsilon)
        scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
        x = normalize(x, factor, scale, NORM, kind)
    x = x.to(kind)
    tl.store(out + _place(column, size, EIGHTS), x, inside)
    _store_shares(x.to(tl.float32), down, shares, size, column, inside, rank, RANK)


@triton.jit
def add_kernel(
    hidden,
    delta,
    weight,
    size,
    epsilon,
    residual,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What a block puts out, normalized where it is and scaled, on top of the residual."""
    enter(EARLY)
    kind = hidden.dtype.element_ty
    column = tl.arange(0, WHOLE)
    inside = column < size
    x = tl.load(delta + column, inside, 0.0).to(tl.float32)
    if NORM > 0:
        scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
        x = normalize(x, tl.rsqrt(tl.sum(x * x) / size + epsilon), scale, NORM, kind)
    x = (x.to(kind).to(tl.float32) * residual).to(kind).to(tl.float32)
    before = tl.load(hidden + column, inside, 0.0).to(tl.float32)
    tl.store(hidden + column, (before + x).to(kind), inside)


@triton.jit
def gate_kernel(
    both,
    down,
    out,
    shares,
    size,
    rank,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    EIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``BLOCK`` columns of ``activation(gate) * up``; or of the activation alone."""
    enter(EARLY)
    kind = out.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(both + column, inside, 0.0).to(tl.float32)
    x = activate(gate, ACTIVATION)
    if GATED:
        x *= tl.load(both + size + column, inside, 0.0).to(tl.float32)
    x = x.to(kind)
    tl.store(out + _place(column, size, EIGHTS), x, inside)
    _store_shares(x.to(tl.float32), down, shares, size, column, inside, rank, RANK)


@triton.jit
def _turn(first, second, weight, cos, sin, one, other, mask, SIZE: tl.constexpr, epsilon,
          HAS_NORM: tl.constexpr, NORM: tl.constexpr, kind: tl.constexpr):  # fmt: skip
    """Normalize and rotate heads, shape ``(heads, HALF)`` for each half."""
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / SIZE + epsilon)[:, None]
        left = tl.load(weight + one, mask, 0.0).to(tl.float32)[None, :]
        right = tl.load(weight + other, mask, 0.0).to(tl.float32)[None, :]
        first = normalize(first, scale, left, NORM, kind).to(kind).to(tl.float32)
        second = normalize(second, scale, right, NORM, kind).to(kind).to(tl.float32)
    turned = (first * cos - second * sin).to(kind)
    return turned, (second * cos + first * sin).to(kind)


@triton.jit
def attention_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    stretch,
    positions,
    keys,
    values,
    parts,
    sums,
    capacity,
    scale,
    softcap,
    window,
    epsilon,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORM: tl.constexpr,
    TURNS: tl.constexpr,
    PAIRS: tl.constexpr,
    STRETCHES: tl.constexpr,
    CAPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A share of a key head's tokens for the ``SHARED`` query heads that read it.

    Heads are normalized and rotated here. The first share also has the new token, whose key and
    value it puts into the cache; no program reads them there in this step.
    """
    enter(EARLY)
    group, split = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(0)
    kind = keys.dtype.element_ty
    position = tl.load(positions)
    lane = tl.arange(0, HALF)
    mask = lane < SIZE // 2
    head = tl.arange(0, ROWS)
    here = (head < SHARED)[:, None] & mask[None, :]
    one, other = halve(lane, SIZE, TURNS, PAIRS)
    c, s = read_turn(cos, sin, position, lane, TURNS, PAIRS)
    c, s = c[None, :], s[None, :]
    source = qkv + (group * SHARED + head[:, None]) * SIZE
    first = tl.load(source + one[None, :], here, 0.0).to(tl.float32)
    second = tl.load(source + other[None, :], here, 0.0).to(tl.float32)
    q1, q2 = _turn(
        first, second, q_norm, c, s, one, other, mask, SIZE, epsilon, HAS_NORM, NORM, kind
    )
    if STRETCHES:
        more = tl.load(stretch + position).to(tl.float32)
        q1, q2 = (q1.to(tl.float32) * more).to(kind), (q2.to(tl.float32) * more).to(kind)
    source = qkv + (groups * SHARED + group) * SIZE
    first = tl.load(source + one[None, :], mask[None, :], 0.0).to(tl.float32)
    second = tl.load(source + other[None, :], mask[None, :], 0.0).to(tl.float32)
    k1, k2 = _turn(
        first, second, k_norm, c, s, one, other, mask, SIZE, epsilon, HAS_NORM, NORM, kind
    )
    wide = tl.arange(0, WIDE)
    new = tl.load(qkv + (groups * (SHARED + 1) + group) * SIZE + wide, wide < SIZE, 0.0)
    base = group.to(tl.int64) * capacity
    target = keys + (base + position) * SIZE
    is_first = split == 0
    tl.store(target + one[None, :], k1, mask[None, :] & is_first)
    tl.store(target + other[None, :], k2, mask[None, :] & is_first)
    tl.store(values + (base + position) * SIZE + wide, new, (wide < SIZE) & is_first)
    most = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
    most = (most + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)) * scale
    most = cap(most, softcap, CAPS)
    most = tl.where(is_first, most, -1e30)
    total = tl.where(is_first, tl.full((ROWS,), 1.0, tl.float32), 0.0)
    out = tl.zeros((ROWS, WIDE), tl.float32) + new.to(tl.float32)[None, :]
    out = tl.where(is_first, out, 0.0)
    length = position.to(tl.int32)
    # The new token is one of those that it looks at.
    seen = tl.maximum(length + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(length - seen, SPLITS), KEYS) * KEYS
    start = seen + split * share
    end = tl.minimum(start + share, length)
    for begin in range(start, end, KEYS):
        at = begin + tl.arange(0, KEYS)
        inside = (at < end)[:, None]
        place = keys + (base + at[:, None]) * SIZE
        left = tl.load(place + one[None, :], inside & mask[None, :], 0.0)
        right = tl.load(place + other[None, :], inside & mask[None, :], 0.0)
        place = values + (base + at[:, None]) * SIZE + wide[None, :]
        value = tl.load(place, inside & (wide < SIZE)[None, :], 0.0)
        score = tl.dot(q1, tl.trans(left), input_precision="ieee")
        score = tl.dot(q2, tl.trans(right), score, input_precision="ieee") * scale
        score = cap(score, softcap, CAPS)
        score = tl.where((at < end)[None, :], score, -1e30)
        larger = tl.maximum(most, tl.max(score, 1))
        chance = tl.exp(score - larger[:, None])
        fade = tl.exp(most - larger)
        total = total * fade + tl.sum(chance, 1)
        out = out * fade[:, None] + tl.dot(chance.to(kind), value, input_precision="ieee")
        most = larger
    place = (group * SPLITS + split) * SHARED + head
    kept = (head < SHARED)[:, None] & (wide < SIZE)[None, :]
    tl.store(parts + place[:, None] * SIZE + wide[None, :], out, kept)
    tl.store(sums + 2 * place, most, head < SHARED)
    tl.store(sums + 2 * place + 1, total, head < SHARED)


@triton.jit
def combine_kernel(
    parts,
    sums,
    down,
    out,
    shares,
    size,
    rank,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    EIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The shares of one query head, each scaled to the largest score."""
    enter(EARLY)
    head = tl.program_id(0)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    place = (head // SHARED * SPLITS + split) * SHARED + head % SHARED
    most, total = tl.load(sums + 2 * place), tl.load(sums + 2 * place + 1)
    weight = tl.exp(most - tl.max(most))
    inside = lane < SIZE
    here = inside[None, :] & (total[:, None] > 0)
    part = tl.load(parts + place[:, None] * SIZE + lane[None, :], here, 0.0)
    x = (tl.sum(part * weight[:, None], 0) / tl.sum(total * weight)).to(out.dtype.element_ty)
    column = head * SIZE + lane
    tl.store(out + _place(column, size, EIGHTS), x, inside)
    _store_shares(x.to(tl.float32), down, shares, size, column, inside, rank, RANK)
