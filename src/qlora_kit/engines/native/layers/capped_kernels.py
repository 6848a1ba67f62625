"""Soft-capped attention within each example, in Triton: no scores leave the chip.

FlashAttention-2 (Dao, arXiv:2307.08691) with :mod:`capped_attention`'s cap on the scores, windows
and grouped keys. Imported only where Triton runs; :func:`try_kernels` holds them to the plain
expressions before a run relies on them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kit.engines.native.layers.capped_attention import capped_backward, capped_forward

__all__ = ["capped_segments", "capped_segments_backward", "try_kernels"]

#: Tokens of a tile of queries and of keys: two tiles of each with 256 dimensions fit into 99 KiB.
_QUERIES, _KEYS = 32, 32


def capped_segments(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`attention.attend`; also the log of each softmax's denominator, ``(H, T)``."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(longest, _QUERIES), len(bounds) - 1, q.shape[1])
    _forward_kernel[grid](
        q, k, v, out, lse, bounds, q.shape[0], window or longest, scale, softcap, **_shape(q, k)
    )
    return out, lse


def capped_segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor,
    longest: int, window: int, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of queries, keys and values."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    # (H, T): what the softmax's backward pass takes off.
    above = (grad.float() * out.float()).sum(-1).T.contiguous()
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    examples = len(bounds) - 1
    common = (bounds, q.shape[0], window or longest, scale, softcap)
    _query_kernel[(triton.cdiv(longest, _QUERIES), examples, q.shape[1])](
        grad, q, k, v, lse, above, q_grad, *common, **_shape(q, k)
    )
    _key_kernel[(triton.cdiv(longest, _KEYS), examples, k.shape[1])](
        grad, q, k, v, lse, above, k_grad, v_grad, *common, **_shape(q, k)
    )
    return q_grad, k_grad, v_grad


def try_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> str | None:
    """Why the kernels are not to be used for such heads, or ``None``; they are run to find out.

    Args:
        device: Where.
        dtype: What queries are in.
        heads: Query heads.
        groups: Heads of keys and values.
        width: Width of a head.
    """
    lengths, window, scale, softcap = (70, 1, 41), 37, width**-0.5, 5.0
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn((sum(lengths), count, width), generator=generator).to(device, dtype)
        for count in (heads, groups, groups, heads)
    )
    try:
        out, lse = capped_segments(q, k, v, bounds, max(lengths), window, scale, softcap)
        found = (out, *capped_segments_backward(
            grad, q, k, v, out, lse, bounds, max(lengths), window, scale, softcap
        ))  # fmt: skip
    # Whatever a compiler or a driver says: there is another way.
    except Exception as error:  # noqa: BLE001
        return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    mask = _mask_all(lengths, window).to(device)
    wide = [one.float().transpose(0, 1) for one in (q, k, v, grad)]
    keys, values = (one.repeat_interleave(heads // groups, 0) for one in wide[1:3])
    plain, plain_lse = capped_forward(wide[0], keys, values, mask, scale, softcap)
    grads = capped_backward(wide[3], wide[0], keys, values, plain, plain_lse, mask, scale, softcap)
    summed = [one.unflatten(0, (groups, -1)).sum(1) for one in grads[1:]]
    for one, expected in zip(found, (plain, grads[0], *summed), strict=True):
        gap = float((one.float().transpose(0, 1) - expected).norm() / expected.norm())
        if not gap < 0.02:
            return f"they are off by {gap:.1%} here"
    return None


def _mask_all(lengths: tuple[int, ...], window: int) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    places = torch.arange(len(owner))
    away = places[:, None] - places[None]
    return (owner[:, None] == owner[None]) & (away >= 0) & (away < window)


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    heads, width = q.shape[1:]
    block = max(16, triton.next_power_of_2(width))
    return {
        "HEADS": heads, "GROUPS": heads // k.shape[1], "WIDTH": width, "BLOCK_D": block,
        "BLOCK_M": _QUERIES, "BLOCK_N": _KEYS, "num_warps": 8 if block > 128 else 4,
        "num_stages": 1,
    }  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _tile(base, rows, start, length, head, heads, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Pointers to ``rows`` of an example from ``start`` on, and which of them exist."""
    lanes = tl.arange(0, BLOCK_D)
    places = base + ((start + rows).to(tl.int64) * heads + head)[:, None] * WIDTH + lanes[None, :]
    return places, (rows < length)[:, None] & (lanes < WIDTH)[None, :]


@triton.jit
def _score(q, k, queries, keys, length, window, scale, softcap):  # type: ignore[no-untyped-def]
    """Capped scores ``(M, N)``, -1e30 where a query may not look, and the cap's tanh."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    cap = 2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0
    away = queries[:, None] - keys[None, :]
    allowed = (away >= 0) & (away < window) & (queries < length)[:, None]
    return tl.where(allowed, cap * softcap, -1.0e30), cap


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, bounds, tokens, window, scale, softcap,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # noqa: N803
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    start = tl.load(bounds + tl.program_id(1))
    length = tl.load(bounds + tl.program_id(1) + 1) - start
    head = tl.program_id(2)
    if first < length:
        queries = first + tl.arange(0, BLOCK_M)
        places, exists = _tile(q, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
        own = tl.load(places, exists, other=0.0)
        highest = tl.full((BLOCK_M,), -1.0e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        oldest = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        for at in range(oldest, tl.minimum(first + BLOCK_M, length), BLOCK_N):
            keys = at + tl.arange(0, BLOCK_N)
            near, near_exists = _tile(
                k, keys, start, length, head // GROUPS, HEADS // GROUPS, WIDTH, BLOCK_D
            )
            key = tl.load(near, near_exists, other=0.0)
            scores, _ = _score(own, key, queries, keys, length, window, scale, softcap)
            raised = tl.maximum(highest, tl.max(scores, 1))
            shares = tl.where(scores > -1.0e29, tl.exp(scores - raised[:, None]), 0.0)
            factor = tl.exp(highest - raised)
            total = total * factor + tl.sum(shares, 1)
            near, near_exists = _tile(
                v, keys, start, length, head // GROUPS, HEADS // GROUPS, WIDTH, BLOCK_D
            )
            value = tl.load(near, near_exists, other=0.0)
            summed = summed * factor[:, None]
            summed += tl.dot(shares.to(value.dtype), value, input_precision="ieee")
            highest = raised
        total = tl.maximum(total, 1.0e-30)  # of rows that do not exist
        places, exists = _tile(out, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
        tl.store(places, (summed / total[:, None]).to(out.dtype.element_ty), exists)
        tl.store(lse + head * tokens + start + queries, highest + tl.log(total), queries < length)


@triton.jit
def _score_grad(grad, q, k, v, queries, keys, length, window, scale, softcap, lse, above):  # type: ignore[no-untyped-def]
    """Softmax's shares ``(M, N)`` again, and the gradient of scores before scale and cap."""
    scores, cap = _score(q, k, queries, keys, length, window, scale, softcap)
    shares = tl.where(scores > -1.0e29, tl.exp(scores - lse[:, None]), 0.0)
    share_grad = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return shares, shares * (share_grad - above[:, None]) * (1.0 - cap * cap) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _query_kernel(  # type: ignore[no-untyped-def]
    grad, q, k, v, lse, above, q_grad, bounds, tokens, window, scale, softcap,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # noqa: N803
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    start = tl.load(bounds + tl.program_id(1))
    length = tl.load(bounds + tl.program_id(1) + 1) - start
    head = tl.program_id(2)
    if first < length:
        queries = first + tl.arange(0, BLOCK_M)
        places, exists = _tile(q, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
        own = tl.load(places, exists, other=0.0)
        places, exists = _tile(grad, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
        given = tl.load(places, exists, other=0.0)
        row = head * tokens + start + queries
        own_lse = tl.load(lse + row, queries < length, other=0.0)
        own_above = tl.load(above + row, queries < length, other=0.0)
        summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        oldest = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        for at in range(oldest, tl.minimum(first + BLOCK_M, length), BLOCK_N):
            keys = at + tl.arange(0, BLOCK_N)
            near, near_exists = _tile(
                k, keys, start, length, head // GROUPS, HEADS // GROUPS, WIDTH, BLOCK_D
            )
            key = tl.load(near, near_exists, other=0.0)
            near, near_exists = _tile(
                v, keys, start, length, head // GROUPS, HEADS // GROUPS, WIDTH, BLOCK_D
            )
            value = tl.load(near, near_exists, other=0.0)
            _, score_grad = _score_grad(
                given, own, key, value, queries, keys, length, window, scale, softcap, own_lse,
                own_above,
            )  # fmt: skip
            summed += tl.dot(score_grad.to(key.dtype), key, input_precision="ieee")
        places, exists = _tile(q_grad, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
        tl.store(places, summed.to(q_grad.dtype.element_ty), exists)


@triton.jit  # type: ignore[untyped-decorator]
def _key_kernel(  # type: ignore[no-untyped-def]
    grad, q, k, v, lse, above, k_grad, v_grad, bounds, tokens, window, scale, softcap,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # noqa: N803
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    start = tl.load(bounds + tl.program_id(1))
    length = tl.load(bounds + tl.program_id(1) + 1) - start
    group = tl.program_id(2)
    if first < length:
        keys = first + tl.arange(0, BLOCK_N)
        places, exists = _tile(k, keys, start, length, group, HEADS // GROUPS, WIDTH, BLOCK_D)
        key = tl.load(places, exists, other=0.0)
        places, exists = _tile(v, keys, start, length, group, HEADS // GROUPS, WIDTH, BLOCK_D)
        value = tl.load(places, exists, other=0.0)
        key_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        value_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        newest = tl.minimum(length, first + BLOCK_N + window - 1)
        for head in range(group * GROUPS, group * GROUPS + GROUPS):
            for at in range(first // BLOCK_M * BLOCK_M, newest, BLOCK_M):
                queries = at + tl.arange(0, BLOCK_M)
                near, near_exists = _tile(q, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
                query = tl.load(near, near_exists, other=0.0)
                near, near_exists = _tile(grad, queries, start, length, head, HEADS, WIDTH, BLOCK_D)
                given = tl.load(near, near_exists, other=0.0)
                row = head * tokens + start + queries
                own_lse = tl.load(lse + row, queries < length, other=0.0)
                own_above = tl.load(above + row, queries < length, other=0.0)
                shares, score_grad = _score_grad(
                    given, query, key, value, queries, keys, length, window, scale, softcap,
                    own_lse, own_above,
                )  # fmt: skip
                value_sum += tl.dot(tl.trans(shares).to(given.dtype), given, input_precision="ieee")
                key_sum += tl.dot(
                    tl.trans(score_grad).to(query.dtype), query, input_precision="ieee"
                )
        places, exists = _tile(k_grad, keys, start, length, group, HEADS // GROUPS, WIDTH, BLOCK_D)
        tl.store(places, key_sum.to(k_grad.dtype.element_ty), exists)
        places, exists = _tile(v_grad, keys, start, length, group, HEADS // GROUPS, WIDTH, BLOCK_D)
        tl.store(places, value_sum.to(v_grad.dtype.element_ty), exists)
