"""Attention within each example on a CPU, one or a few of torch's calls for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.engines.native.layers import CAPPED_QUERIES
from qlora_kit.engines.native.layers.capped_attention import capped_backward, capped_forward

__all__ = ["attend_segments", "attend_segments_backward", "lse_dtype"]

#: Fewer queries a call than this cost more in calls than a narrow window saves.
_LEAST_QUERIES = 128


class _Tile(NamedTuple):
    """Some of an example's queries, and the keys that one of them may look at.

    ``mask`` is ``None`` where keys and queries are the same and only order matters.
    """

    queries: slice
    keys: slice
    mask: Tensor | None


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`attention.attend`; also the log of each softmax's denominator, ``(T, H)``."""
    repeats = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=lse_dtype(q.dtype), device=q.device)
    for tile in _list_tiles(bounds, window, softcap):
        inputs = (
            _as_batch(q, tile.queries), _as_batch(k, tile.keys, repeats),
            _as_batch(v, tile.keys, repeats),
        )  # fmt: skip
        if softcap:
            part, part_lse = capped_forward(*inputs, _as_allowed(tile, q), scale, softcap)
        else:
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, 0.0, tile.mask is None, attn_mask=_as_added(tile, q), scale=scale
            )
        out[tile.queries] = part[0].transpose(0, 1)
        lse[tile.queries] = part_lse[0].T
    return out, lse


def attend_segments_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    repeats = q.shape[1] // k.shape[1]
    # Where several calls add to a key's gradient, the sum is rounded once.
    dtype = lse.dtype if softcap or window is not None else q.dtype
    grads = tuple(
        torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        for tensor in (q, k, v)
    )
    for tile in _list_tiles(bounds, window, softcap):
        inputs = (
            _as_batch(grad, tile.queries), _as_batch(q, tile.queries),
            _as_batch(k, tile.keys, repeats), _as_batch(v, tile.keys, repeats),
            _as_batch(out, tile.queries), lse[tile.queries].T[None],
        )  # fmt: skip
        if softcap:
            parts = capped_backward(*inputs, _as_allowed(tile, q), scale, softcap)
        else:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, 0.0, tile.mask is None, attn_mask=_as_added(tile, q), scale=scale
            )
        for whole, part, where in zip(
            grads, parts, (tile.queries, tile.keys, tile.keys), strict=True
        ):
            heads = part[0]
            # (H, L, D) -> (G, L, D): a key head served several query heads, whose gradients add.
            if where is tile.keys and repeats > 1:
                heads = heads.unflatten(0, (-1, repeats)).sum(1)
            whole[where] += heads.transpose(0, 1)
    q_grad, k_grad, v_grad = (grad.to(q.dtype) for grad in grads)
    return q_grad, k_grad, v_grad


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that softmax denominators of queries of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _list_tiles(bounds: Tensor, window: Tensor | None, softcap: float) -> Iterator[_Tile]:
    reach = 0 if window is None else int(window)
    for start, end in pairwise(bounds.tolist()):
        length = end - start
        is_narrow = 0 < reach < length
        step = length
        if is_narrow:
            step = max(reach, _LEAST_QUERIES)
        if softcap:
            step = min(step, CAPPED_QUERIES)
        for first in range(0, length, max(step, 1)):
            last = min(first + step, length)
            oldest = max(0, first - reach + 1) if is_narrow else 0
            mask = None
            if first > 0 or (is_narrow and last > reach):
                mask = _make_mask(first, last, oldest, reach if is_narrow else 0)
            yield _Tile(
                slice(start + first, start + last), slice(start + oldest, start + last), mask
            )


def _make_mask(first: int, last: int, oldest: int, reach: int) -> Tensor:
    """Which of the keys from ``oldest`` on the queries from ``first`` on may look at."""
    queries, keys = torch.arange(first, last)[:, None], torch.arange(oldest, last)[None]
    allowed = keys <= queries
    return allowed & (keys > queries - reach) if reach else allowed


def _as_added(tile: _Tile, like: Tensor) -> Tensor | None:
    """What is added to the scores."""
    if tile.mask is None:
        return None
    added = torch.zeros(tile.mask.shape, dtype=like.dtype)
    return added.masked_fill_(~tile.mask, -torch.inf)[None, None]


def _as_allowed(tile: _Tile, like: Tensor) -> Tensor:
    if tile.mask is not None:
        return tile.mask
    length = tile.queries.stop - tile.queries.start
    return torch.ones((length, length), dtype=torch.bool).tril_()


def _as_batch(tensor: Tensor, where: slice, repeats: int = 1) -> Tensor:
    part = tensor[where].transpose(0, 1)
    return (part.repeat_interleave(repeats, dim=0) if repeats > 1 else part)[None]
