"""Attention whose scores are soft-capped, ``c tanh(s / c)`` (Gemma 2, arXiv:2408.00118).

No kernel of torch's caps scores. Here they are written out, for some hundred queries at a time, and
computed again in the backward pass; :mod:`capped_kernels` does without on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_kit.engines.native.layers import CAPPED_QUERIES
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle

__all__ = ["attend_capped", "capped_backward", "capped_forward", "find_kernel_obstacle"]

_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "capped_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, float softcap)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "capped_attention_grad(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor mask, float scale, float softcap) -> (Tensor, Tensor, Tensor)"
)


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention where ``mask`` allows it.

    Args:
        q: Queries, shape ``(H, T, D)``.
        k: Keys, the same shape.
        v: Values, the same shape.
        mask: Boolean, shape ``(T, T)``; every query may look at one key at least.
        scale: What scores are multiplied with.
        softcap: What they are capped at.

    Returns:
        Shape ``(H, T, D)``.
    """
    out: Tensor = torch.ops.qlora_kit.capped_attention(q, k, v, mask, scale, softcap)[0]
    return out


def find_kernel_obstacle(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> str | None:
    """Why :mod:`capped_kernels` is not to be used on a GPU, or ``None``.

    Args:
        device: The GPU.
        dtype: What queries are in.
        heads: Query heads.
        groups: Heads of keys and values.
        width: Width of a head.
    """
    obstacle = find_compile_obstacle(device)
    if obstacle is not None:
        return obstacle
    from qlora_kit.engines.native.layers.capped_kernels import try_kernels

    return try_kernels(device, dtype, heads, groups, width)


def capped_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The output ``(H, L, D)`` of ``L`` queries, and the log of each softmax's denominator."""
    scores = _compute_cap(q, k, scale, softcap).mul_(softcap).masked_fill_(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    shares = scores.sub_(lse[..., None]).exp_()
    return shares.to(v.dtype) @ v, lse


def capped_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of :func:`capped_forward`."""
    cap = _compute_cap(q, k, scale, softcap)
    shares = (cap * softcap).masked_fill_(~mask, -torch.inf).sub_(lse[..., None]).exp_()
    v_grad = shares.to(grad.dtype).transpose(-1, -2) @ grad
    # The softmax's backward pass, then the cap's: (c tanh(s / c))' = 1 - tanh(s / c)^2.
    above = (grad.to(cap.dtype) * out.to(cap.dtype)).sum(-1, keepdim=True)
    score_grad = (grad @ v.transpose(-1, -2)).to(cap.dtype).sub_(above).mul_(shares)
    score_grad = score_grad.mul_(1 - cap.square_()).mul_(scale).to(q.dtype)
    return score_grad @ k, score_grad.transpose(-1, -2) @ q, v_grad


def _compute_cap(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """``tanh(s / c)``, shape ``(H, L, K)``, in float32 or wider."""
    scores = q @ k.transpose(-1, -2)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.mul_(scale / softcap).tanh_()


def _tile(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, CAPPED_QUERIES):
        yield slice(start, min(start + CAPPED_QUERIES, tokens))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    parts = [
        capped_forward(q[:, rows], k, v, mask[rows], scale, softcap) for rows in _tile(q.shape[1])
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _backward_parts(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad = torch.empty_like(q)
    # Sums over many queries' parts are rounded once.
    k_grad, v_grad = (torch.zeros_like(one, dtype=lse.dtype) for one in (k, v))
    for rows in _tile(q.shape[1]):
        part = capped_backward(
            grad[:, rows], q[:, rows], k, v, out[:, rows], lse[:, rows], mask[rows], scale, softcap
        )
        q_grad[:, rows] = part[0]
        k_grad += part[1]
        v_grad += part[2]
    return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float)
    return q.new_empty(q.shape), lse


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, mask)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    grads = torch.ops.qlora_kit.capped_attention_grad(
        grad, *ctx.saved_tensors, ctx.scale, ctx.softcap
    )
    return (*grads, None, None, None)


_LIBRARY.impl("capped_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("capped_attention_grad", _backward_parts, "CompositeExplicitAutograd")
torch.library.register_fake("qlora_kit::capped_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("qlora_kit::capped_attention_grad", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "qlora_kit::capped_attention", _backward, setup_context=_remember, lib=_LIBRARY
)
