"""One more token of one answer: its kernels, launched in order.

Where the driver knows how (compute capability 9.0), a kernel begins to read its weights while the
one before it still runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

from qlora_kit.engines.native.decoding import row_kernels as kernels
from qlora_kit.engines.native.decoding import row_products as products
from qlora_kit.engines.native.decoding.kernel_parts import ACTIVATIONS, NORMS, shape_heads
from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.layer import LayerShape, Norm

__all__ = ["covers", "read_row_logits", "reads_stored", "run_row"]

#: Columns of a program that makes a product's input.
_NORM_BLOCK: Final = 64
_GATE_BLOCK: Final = 128
#: Tokens that a program of the attention kernel takes at once, and programs that it aims at.
_KEYS: Final = 64
_PROGRAMS: Final = 256


class Tile(NamedTuple):
    """What a program of a product takes at once."""

    rows: int
    block: int
    warps: int


#: The best of several on an H200 (2026-11-28) for inputs of fewer than 4,096 columns, of fewer
#: than 8,192, and of more.
_TILES: Final = (Tile(4, 256, 1), Tile(4, 1024, 4), Tile(4, 1024, 4))
_PACKED_TILES: Final = (Tile(2, 128, 1), Tile(2, 512, 4), Tile(4, 256, 2))


class _Input(NamedTuple):
    """A product's input, shape ``(K,)``, and shares of ``down @ x``, shape ``(shares, R)``."""

    x: Tensor
    shares: Tensor


def covers(decoder: Any) -> bool:
    """Whether the kernels read this model's weights as they are kept now."""
    return all(
        group.whole is not None or not group.group.scales or _is_packed(group)
        for layer in decoder.layers
        for group in layer.groups()
    )


def reads_stored(decoder: Any) -> bool:
    """Whether they read them as they are stored."""
    return all(
        not group.group.scales or _is_packed(group)
        for layer in decoder.layers
        for group in layer.groups()
    )


def _is_packed(weights: DecodingWeights) -> bool:
    """Whether weights are read four bits at a time, by values rounded to 11 bits."""
    group = weights.group
    return (
        weights.dtype != torch.float32
        and bool(group.scales)
        and group.blocksize % 8 == 0
        and group.columns % group.blocksize == 0
        and len(group.rows) <= 3
    )


def run_row(
    decoder: Any, cache: KeyValueCache, hidden: Tensor, positions: Tensor, rotations: Any
) -> Tensor:
    """All layers for one token of the first slot.

    Args:
        decoder: The :class:`decoder.Decoder`.
        cache: Read and written.
        hidden: An embedding, contiguous, shape ``(1, H)``; overwritten.
        positions: int64, shape ``(1,)``.
        rotations: The :class:`decoder.Rotations` of the cache's room.

    Returns:
        ``hidden``.
    """
    shape = decoder.shape
    for index, layer in enumerate(decoder.layers):
        tensors = layer.tensors
        given = _normalize(hidden, tensors.before_attention, tensors.qkv, shape)
        qkv = _multiply(tensors.qkv, given)
        given = _attend(decoder, layer, cache, index, qkv, positions, rotations)
        _add(hidden, tensors.out, given, tensors.after_attention, shape)
        if layer.experts is not None:
            x = torch.empty_like(hidden)
            _launch_norm(hidden, tensors.before_mlp, None, _Input(x, x), shape, eighths=False)
            _launch_add(hidden, layer.experts.answer(x), tensors.after_mlp, shape)
            continue
        given = _normalize(hidden, tensors.before_mlp, tensors.gate_up, shape)
        given = _gate(_multiply(tensors.gate_up, given), tensors.down, shape)
        _add(hidden, tensors.down, given, tensors.after_mlp, shape)
    return hidden


def _add(
    hidden: Tensor, weights: DecodingWeights, given: _Input, after: Norm | None, shape: LayerShape
) -> None:
    """A block's product on top of ``hidden``, in a kernel of its own where more happens to it."""
    if after is None and shape.residual == 1.0:
        _multiply(weights, given, hidden)
    else:
        _launch_add(hidden, _multiply(weights, given), after, shape)


def _launch_add(hidden: Tensor, delta: Tensor, after: Norm | None, shape: LayerShape) -> None:
    size = hidden.shape[1]
    kernels.add_kernel[(1,)](
        hidden, delta, delta if after is None else after.weight, size, shape.epsilon,
        shape.residual, NORM=0 if after is None else NORMS[shape.norm],
        WHOLE=triton.next_power_of_2(size), num_warps=8, **_early(hidden.device),
    )  # fmt: skip


def read_row_logits(decoder: Any, hidden: Tensor) -> Tensor:
    """The head's product with a row, shape ``(1, V)``."""
    head = decoder.vocabulary.head
    x = torch.empty_like(hidden)
    norm = Norm(decoder.vocabulary.norm.weight)
    _launch_norm(hidden, norm, None, _Input(x, x), decoder.shape, eighths=False)
    out = hidden.new_empty((1, head.shape[0]))
    _launch_product(
        [head], head.stride(0), [head.shape[0]], head.shape[1], None, None, _Input(x, x), None, out
    )
    return out


def _make_input(weights: DecodingWeights, count: int, like: Tensor) -> _Input:
    shares = torch.empty((count, weights.rank), device=like.device, dtype=torch.float32)
    return _Input(like.new_empty(weights.group.columns), shares)


def _normalize(
    hidden: Tensor, norm: Norm | None, weights: DecodingWeights, shape: LayerShape
) -> _Input:
    given = _make_input(weights, triton.cdiv(hidden.shape[1], _NORM_BLOCK), hidden)
    _launch_norm(hidden, norm, weights.down, given, shape, eighths=_is_packed(weights))
    return given


def _launch_norm(
    hidden: Tensor, norm: Norm | None, down: Tensor | None, given: _Input, shape: LayerShape, *,
    eighths: bool,
) -> None:  # fmt: skip
    size = hidden.shape[1]
    rank = 0 if down is None else down.shape[0]
    kernels.norm_kernel[(triton.cdiv(size, _NORM_BLOCK),)](
        hidden, hidden if norm is None else norm.weight, hidden if down is None else down, given.x,
        given.shares, size, rank, shape.epsilon, NORM=0 if norm is None else NORMS[shape.norm],
        WHOLE=triton.next_power_of_2(size), BLOCK=_NORM_BLOCK, RANK=rank, EIGHTS=eighths,
        num_warps=4, **_early(hidden.device),
    )  # fmt: skip


def _gate(both: Tensor, weights: DecodingWeights, shape: LayerShape) -> _Input:
    size = weights.group.columns
    count = triton.cdiv(size, _GATE_BLOCK)
    given = _make_input(weights, count, both)
    kernels.gate_kernel[(count,)](
        both, both if weights.down is None else weights.down, given.x, given.shares, size,
        weights.rank, ACTIVATION=ACTIVATIONS[shape.activation], GATED=shape.is_gated,
        BLOCK=_GATE_BLOCK, RANK=weights.rank, EIGHTS=_is_packed(weights),
        num_warps=4, **_early(both.device),
    )  # fmt: skip
    return given


def _attend(
    decoder: Any,
    layer: Any,
    cache: KeyValueCache,
    index: int,
    qkv: Tensor,
    positions: Tensor,
    rotations: Any,
) -> _Input:
    tensors, turn, stretch = layer.tensors, rotations.layers[index], rotations.stretch
    shape = decoder.shape
    heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
    shared = heads // groups
    splits = triton.next_power_of_2(max(1, _PROGRAMS // groups))
    splits = min(splits, triton.next_power_of_2(triton.cdiv(cache.capacity, _KEYS)))
    parts = torch.empty((groups, splits, shared, size), device=qkv.device)
    sums = torch.empty((groups, splits, shared, 2), device=qkv.device)
    has_norm = tensors.q_norm is not None
    q_norm, k_norm = (tensors.q_norm.weight, tensors.k_norm.weight) if has_norm else (qkv, qkv)
    # Smaller tiles than 16 are no work for a matrix unit.
    half = max(16, triton.next_power_of_2(size // 2))
    wide = max(16, triton.next_power_of_2(size))
    kernels.attention_kernel[(groups, splits)](
        qkv, q_norm, k_norm, *turn, qkv if stretch is None else stretch, positions,
        cache.keys[index], cache.values[index], parts, sums, cache.capacity, shape.scale,
        shape.softcap, layer.window or cache.capacity, shape.epsilon, SHARED=shared, SIZE=size,
        HALF=half, WIDE=wide, SPLITS=splits, KEYS=_KEYS,
        ROWS=max(16, triton.next_power_of_2(shared)),
        HAS_NORM=has_norm, STRETCHES=stretch is not None, CAPS=bool(shape.softcap),
        **shape_heads(shape, turn.cos.shape[1]), num_warps=4, **_early(qkv.device),
    )  # fmt: skip
    weights = tensors.out
    given = _make_input(weights, heads, qkv)
    kernels.combine_kernel[(heads,)](
        parts, sums, qkv if weights.down is None else weights.down, given.x, given.shares,
        heads * size, weights.rank, SHARED=shared, SIZE=size, WIDE=wide, SPLITS=splits,
        RANK=weights.rank, EIGHTS=_is_packed(weights), num_warps=4, **_early(qkv.device),
    )  # fmt: skip
    return given


def _multiply(weights: DecodingWeights, given: _Input, residual: Tensor | None = None) -> Tensor:
    """A group's product, shape ``(1, N)``; or ``residual``, to which it is added in place."""
    group = weights.group
    out = given.x.new_empty((1, sum(group.rows))) if residual is None else residual
    if _is_packed(weights):
        _launch_packed(weights, given, residual, out)
        return out
    if weights.whole is not None:
        matrices, rows = [weights.whole], [sum(group.rows)]
    else:
        matrices, rows = group.weights, group.rows
    _launch_product(
        matrices, matrices[0].stride(0), rows, group.columns, weights.up, group.bias, given,
        residual, out,
    )  # fmt: skip
    return out


def _launch_product(
    matrices: list[Tensor],
    stride: int,
    rows: list[int],
    columns: int,
    up: Tensor | None,
    bias: Tensor | None,
    given: _Input,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    tile = _TILES[(columns >= 4096) + (columns >= 8192)]
    step = _fit_rows(tile.rows, rows)
    ends, total = _bound(rows)
    products.product_kernel[(triton.cdiv(total, step),)](
        given.x, *_three(matrices), out if up is None else up, given.shares,
        out if bias is None else bias, out if residual is None else residual, out, *ends, total,
        stride, 0 if up is None else up.shape[1], COLUMNS=columns,
        BLOCK=min(tile.block, triton.next_power_of_2(columns)), ROWS=step,
        **_shared(up, bias, given, residual), num_warps=tile.warps, **_early(out.device),
    )  # fmt: skip


def _launch_packed(
    weights: DecodingWeights, given: _Input, residual: Tensor | None, out: Tensor
) -> None:
    group = weights.group
    tile = _PACKED_TILES[(group.columns >= 4096) + (group.columns >= 8192)]
    step = _fit_rows(tile.rows, group.rows)
    ends, total = _bound(group.rows)
    packed = [weight.view(-1).view(torch.int32) for weight in group.weights]
    products.packed_product_kernel[(triton.cdiv(total, step),)](
        given.x, *_three(packed), *_three(group.scales),
        out if weights.up is None else weights.up, given.shares,
        out if group.bias is None else group.bias, out if residual is None else residual, out,
        *ends, total, weights.rank, COLUMNS=group.columns,
        BLOCK=min(tile.block, triton.next_power_of_2(group.columns // 8)), ROWS=step,
        BLOCKSIZE=group.blocksize, UNPACK=products.write_unpacking(group.quant_type),
        **_shared(weights.up, group.bias, given, residual), num_warps=tile.warps,
        **_early(out.device),
    )  # fmt: skip


def _shared(
    up: Tensor | None, bias: Tensor | None, given: _Input, residual: Tensor | None
) -> dict[str, Any]:
    count = given.shares.shape[0]
    return {
        "COUNT": count,
        "SHARES": triton.next_power_of_2(count),
        "RANK": 0 if up is None else up.shape[1],
        "HAS_BIAS": bias is not None,
        "ADDS": residual is not None,
    }


def _fit_rows(step: int, rows: list[int]) -> int:
    """Rows of a program, none of which straddles two projections."""
    while any(count % step for count in rows[:-1]):
        step //= 2
    return step


def _bound(rows: list[int]) -> tuple[tuple[int, int], int]:
    """Where the first and the second projection end, and all of them."""
    total = sum(rows)
    second = total if len(rows) < 3 else rows[0] + rows[1]
    return (rows[0], second), total


def _three(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[min(index, len(tensors) - 1)] for index in range(3)]


@cache
def _early(device: torch.device) -> dict[str, bool]:
    """Whether kernels begin before the one before them has ended."""
    can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": can, "launch_pdl": can} if can else {"EARLY": False}
