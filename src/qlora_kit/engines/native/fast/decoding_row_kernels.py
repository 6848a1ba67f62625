"""Triton kernels of a step for one answer, where every kernel's start counts.

A step reads each weight once and computes little. A layer is nine kernels: those that make a
product's input also multiply their share of it with the LoRA A matrices, and leave the shares to
the product, which adds ``up @ low``, biases and the residual before anything is rounded.

Imported only where Triton runs.
"""

# Triton reads capitals as constants, and its functions have no types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "attention_kernel",
    "combine_kernel",
    "gate_kernel",
    "norm_kernel",
    "packed_product_kernel",
    "product_kernel",
]

#: Ranks of the adapters that are taken at once.
_RANKS = tl.constexpr(32)


@triton.jit
def _begin(EARLY: tl.constexpr):
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
    for start in tl.static_range(0, RANK, _RANKS):
        r = start + tl.arange(0, _RANKS)
        here = (r < rank)[:, None] & inside[None, :]
        part = tl.load(down + r[:, None] * size + column[None, :], here, 0.0).to(tl.float32)
        tl.store(shares + program * rank + r, tl.sum(part * x[None, :], 1), r < rank)


@triton.jit
def _add_update(total, up, shares, at, rows, rank, SHARES: tl.constexpr, RANK: tl.constexpr,
                COUNT: tl.constexpr):  # fmt: skip
    """``total + up @ low`` of the shares of ``low``."""
    share = tl.arange(0, SHARES)
    for start in tl.static_range(0, RANK, _RANKS):
        r = start + tl.arange(0, _RANKS)
        here = (share < COUNT)[:, None] & (r < rank)[None, :]
        low = tl.sum(tl.load(shares + share[:, None] * rank + r[None, :], here, 0.0), 0)
        inside = (at < rows)[:, None] & (r < rank)[None, :]
        part = tl.load(up + at[:, None] * rank + r[None, :], inside, 0.0).to(tl.float32)
        total += tl.sum(part * low[None, :], 1)
    return total


@triton.jit
def _finish(total, bias, hidden, out, at, rows, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr):
    """Round a product once and store it, or add it to the residual."""
    inside = at < rows
    kind = out.dtype.element_ty
    if HAS_BIAS:
        total += tl.load(bias + at, inside, 0.0).to(tl.float32)
    value = total.to(kind)
    if ADDS:
        before = tl.load(hidden + at, inside, 0.0)
        value = (before.to(tl.float32) + value.to(tl.float32)).to(kind)
        tl.store(hidden + at, value, inside)
    else:
        tl.store(out + at, value, inside)


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
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    EIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``BLOCK`` columns of a normalized row; each program reads all of it."""
    _begin(EARLY)
    kind = out.dtype.element_ty
    everything = tl.arange(0, WHOLE)
    row = tl.load(hidden + everything, everything < size, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row) / size + epsilon)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(hidden + column, inside, 0.0).to(tl.float32)
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    # Rounded before the weight, as transformers does.
    x = ((x * factor).to(kind).to(tl.float32) * scale).to(kind)
    tl.store(out + _place(column, size, EIGHTS), x, inside)
    _store_shares(x.to(tl.float32), down, shares, size, column, inside, rank, RANK)


@triton.jit
def gate_kernel(
    both,
    down,
    out,
    shares,
    size,
    rank,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    EIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``BLOCK`` columns of ``silu(gate) * up``."""
    _begin(EARLY)
    kind = out.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(both + column, inside, 0.0).to(tl.float32)
    up = tl.load(both + size + column, inside, 0.0).to(tl.float32)
    x = (gate * tl.sigmoid(gate) * up).to(kind)
    tl.store(out + _place(column, size, EIGHTS), x, inside)
    _store_shares(x.to(tl.float32), down, shares, size, column, inside, rank, RANK)


@triton.jit
def _turn(first, second, weight, cos, sin, lane, mask, SIZE: tl.constexpr, epsilon,
          HAS_NORM: tl.constexpr, kind: tl.constexpr):  # fmt: skip
    """Normalize and rotate heads, shape ``(heads, HALF)`` for each half."""
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / SIZE + epsilon)[:, None]
        left = tl.load(weight + lane, mask, 0.0).to(tl.float32)[None, :]
        right = tl.load(weight + SIZE // 2 + lane, mask, 0.0).to(tl.float32)[None, :]
        first = ((first * scale).to(kind).to(tl.float32) * left).to(kind).to(tl.float32)
        second = ((second * scale).to(kind).to(tl.float32) * right).to(kind).to(tl.float32)
    turned = (first * cos - second * sin).to(kind)
    return turned, (second * cos + first * sin).to(kind)


@triton.jit
def attention_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    keys,
    values,
    parts,
    sums,
    capacity,
    scale,
    epsilon,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A share of a key head's tokens for the ``SHARED`` query heads that read it.

    Heads are normalized and rotated here. The first share also has the new token, whose key and
    value it puts into the cache; no program reads them there in this step.
    """
    _begin(EARLY)
    group, split = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(0)
    kind = keys.dtype.element_ty
    position = tl.load(positions)
    lane = tl.arange(0, HALF)
    mask = lane < SIZE // 2
    head = tl.arange(0, ROWS)
    here = (head < SHARED)[:, None] & mask[None, :]
    # Both halves of cosines and sines are alike.
    c = tl.load(cos + position * SIZE + lane, mask, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + position * SIZE + lane, mask, 0.0).to(tl.float32)[None, :]
    source = qkv + (group * SHARED + head[:, None]) * SIZE + lane[None, :]
    first = tl.load(source, here, 0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, here, 0.0).to(tl.float32)
    q1, q2 = _turn(first, second, q_norm, c, s, lane, mask, SIZE, epsilon, HAS_NORM, kind)
    source = qkv + (groups * SHARED + group) * SIZE + lane[None, :]
    first = tl.load(source, mask[None, :], 0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask[None, :], 0.0).to(tl.float32)
    k1, k2 = _turn(first, second, k_norm, c, s, lane, mask, SIZE, epsilon, HAS_NORM, kind)
    wide = tl.arange(0, WIDE)
    new = tl.load(qkv + (groups * (SHARED + 1) + group) * SIZE + wide, wide < SIZE, 0.0)
    base = group.to(tl.int64) * capacity
    target = keys + (base + position) * SIZE + lane[None, :]
    is_first = split == 0
    tl.store(target, k1, mask[None, :] & is_first)
    tl.store(target + SIZE // 2, k2, mask[None, :] & is_first)
    tl.store(values + (base + position) * SIZE + wide, new, (wide < SIZE) & is_first)
    most = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
    most = (most + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)) * scale
    most = tl.where(is_first, most, -1e30)
    total = tl.where(is_first, tl.full((ROWS,), 1.0, tl.float32), 0.0)
    out = tl.zeros((ROWS, WIDE), tl.float32) + new.to(tl.float32)[None, :]
    out = tl.where(is_first, out, 0.0)
    length = position.to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    start = split * share
    end = tl.minimum(start + share, length)
    for begin in range(start, end, KEYS):
        at = begin + tl.arange(0, KEYS)
        inside = (at < end)[:, None]
        place = keys + (base + at[:, None]) * SIZE + lane[None, :]
        left = tl.load(place, inside & mask[None, :], 0.0)
        right = tl.load(place + SIZE // 2, inside & mask[None, :], 0.0)
        place = values + (base + at[:, None]) * SIZE + wide[None, :]
        value = tl.load(place, inside & (wide < SIZE)[None, :], 0.0)
        score = tl.dot(q1, tl.trans(left), input_precision="ieee")
        score = tl.dot(q2, tl.trans(right), score, input_precision="ieee") * scale
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
    _begin(EARLY)
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


@triton.jit
def _choose(row, w0, w1, w2, rows0, rows1):
    """The projection that a row belongs to, of up to three that follow each other."""
    if row < rows0:
        weight, local = w0, row
    elif row < rows1:
        weight, local = w1, row - rows0
    else:
        weight, local = w2, row - rows1
    return weight, local.to(tl.int64)


@triton.jit
def product_kernel(
    x,
    w0,
    w1,
    w2,
    up,
    shares,
    bias,
    hidden,
    out,
    rows0,
    rows1,
    rows,
    stride,
    rank,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    SHARES: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``ROWS`` outputs of a product with weights as they are."""
    row = tl.program_id(0) * ROWS
    weight, local = _choose(row, w0, w1, w2, rows0, rows1)
    lane = tl.arange(0, ROWS)
    at = row + lane
    column = tl.arange(0, BLOCK)
    base = weight + (local + lane)[:, None] * stride + column[None, :]
    here = (at < rows)[:, None]
    # No kernel writes weights: the first of them are on their way before the input is there.
    part = tl.load(base, here & (column < COLUMNS)[None, :], 0.0)
    _begin(EARLY)
    some = tl.load(x + column, column < COLUMNS, 0.0).to(tl.float32)
    total = part.to(tl.float32) * some[None, :]
    for start in tl.static_range(BLOCK, COLUMNS, BLOCK):
        if start + BLOCK <= COLUMNS:
            part = tl.load(base + start, here, 0.0)
            some = tl.load(x + start + column).to(tl.float32)
        else:
            part = tl.load(base + start, here & (start + column < COLUMNS)[None, :], 0.0)
            some = tl.load(x + start + column, start + column < COLUMNS, 0.0).to(tl.float32)
        total += part.to(tl.float32) * some[None, :]
    result = _add_update(tl.sum(total, 1), up, shares, at, rows, rank, SHARES, RANK, COUNT)
    _finish(result, bias, hidden, out, at, rows, HAS_BIAS, ADDS)


@triton.jit
def packed_product_kernel(
    x,
    w0,
    w1,
    w2,
    s0,
    s1,
    s2,
    up,
    shares,
    bias,
    hidden,
    out,
    rows0,
    rows1,
    rows,
    rank,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    SHARES: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    UNPACK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The same with 4-bit weights, eight to an int32 and an input that lies accordingly."""
    row = tl.program_id(0) * ROWS
    weight, local = _choose(row, w0, w1, w2, rows0, rows1)
    scales, _ = _choose(row, s0, s1, s2, rows0, rows1)
    eighths: tl.constexpr = COLUMNS // 8
    lane = tl.arange(0, ROWS)
    at = row + lane
    column = tl.arange(0, BLOCK)
    base = weight + (local + lane)[:, None] * eighths
    ratio: tl.constexpr = BLOCKSIZE // 8
    scales += (local + lane)[:, None] * (COLUMNS // BLOCKSIZE)
    here = (at < rows)[:, None]
    packed = tl.load(base + column[None, :], here & (column < eighths)[None, :], 0)
    scale = tl.load(scales + column[None, :] // ratio, here & (column < eighths)[None, :], 0.0)
    _begin(EARLY)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, eighths, BLOCK):
        place = start + column
        inside = place < eighths
        if start > 0:
            packed = tl.load(base + place[None, :], here & inside[None, :], 0)
            scale = tl.load(scales + place[None, :] // ratio, here & inside[None, :], 0.0)
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            UNPACK, "=f,=f,=f,=f,=f,=f,=f,=f,r", [packed],
            dtype=(tl.float32,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
        part = a * tl.load(x + place, inside, 0.0).to(tl.float32)[None, :]
        part += b * tl.load(x + eighths + place, inside, 0.0).to(tl.float32)[None, :]
        part += c * tl.load(x + 2 * eighths + place, inside, 0.0).to(tl.float32)[None, :]
        part += d * tl.load(x + 3 * eighths + place, inside, 0.0).to(tl.float32)[None, :]
        part += e * tl.load(x + 4 * eighths + place, inside, 0.0).to(tl.float32)[None, :]
        part += f * tl.load(x + 5 * eighths + place, inside, 0.0).to(tl.float32)[None, :]
        part += g * tl.load(x + 6 * eighths + place, inside, 0.0).to(tl.float32)[None, :]
        part += h * tl.load(x + 7 * eighths + place, inside, 0.0).to(tl.float32)[None, :]
        total += part * scale
    result = _add_update(tl.sum(total, 1), up, shares, at, rows, rank, SHARES, RANK, COUNT)
    _finish(result, bias, hidden, out, at, rows, HAS_BIAS, ADDS)
