"""Triton kernels of a step for one answer: matrices times one row.

A product adds ``up @ low``, biases and the residual in float32 before anything is rounded.

Imported only where Triton runs.
"""

# Triton reads capitals as constants, and its functions have no types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from qlora_kit.engines.native.decoding.row_kernels import RANKS, enter

__all__ = ["packed_product_kernel", "product_kernel", "write_unpacking"]


@triton.jit
def _add_update(total, up, shares, at, rows, rank, SHARES: tl.constexpr, RANK: tl.constexpr,
                COUNT: tl.constexpr):  # fmt: skip
    """``total + up @ low`` of the shares of ``low``."""
    share = tl.arange(0, SHARES)
    for start in tl.static_range(0, RANK, RANKS):
        r = start + tl.arange(0, RANKS)
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
    enter(EARLY)
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
    enter(EARLY)
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


@cache
def write_unpacking(quant_type: str) -> str:
    """PTX that turns the eight weights of an int32 into float32, by their order in a row.

    The 16 values stand in float16, four to a register, upper bytes and lower ones apart: PRMT
    picks four bytes of two registers by the nibbles of a third. What is packed first stands in
    the upper half of a byte.
    """
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type(quant_type, device="cpu").to(torch.float16).view(torch.int16).tolist()

    def write_registers(shift: int) -> list[str]:
        found = [(value >> shift) & 255 for value in values]
        return [
            f"0x{int.from_bytes(bytes(found[i : i + 4]), 'little'):08X}" for i in range(0, 16, 4)
        ]

    high, low = write_registers(8), write_registers(0)
    lines = [
        ".reg .b32 m, s, k, a, b, h, l, p;",
        ".reg .b16 u, v;",
        "and.b32 m, $8, 0x77777777;",
        "shr.u32 s, $8, 3;",
        "and.b32 s, s, 0x11111111;",
    ]
    for half in (0, 4):
        if half:
            lines += ["shr.u32 m, m, 16;", "shr.u32 s, s, 16;"]
        # All ones in the bytes whose value is of the table's second half.
        lines.append("prmt.b32 k, 0x0000FF00, 0, s;")
        for target, table in (("h", high), ("l", low)):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, m;",
                f"prmt.b32 b, {table[2]}, {table[3]}, m;",
                f"lop3.b32 {target}, a, b, k, 0xD8;",
            ]
        for first, order in ((half, "0x4051"), (half + 2, "0x6273")):
            lines += [
                f"prmt.b32 p, l, h, {order};",
                "mov.b32 {u, v}, p;",
                f"cvt.f32.f16 ${first}, u;",
                f"cvt.f32.f16 ${first + 1}, v;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"
