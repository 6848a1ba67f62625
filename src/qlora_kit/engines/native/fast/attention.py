"""Causal attention over several examples laid end to end, none of which sees another.

On CUDA one variable-length FlashAttention call (the kernels behind
``torch.nn.attention.varlen``, Dao, arXiv:2307.08691) with cumulative lengths of fixed shape
and grouped keys and values as they are. On a CPU one FlashAttention call per example.
Elsewhere, and on cards older than Ampere, one SDPA call with a block-diagonal mask.

The longest length is a tensor in host memory: as a number it would make ``torch.compile``
build a new graph for each value, and on the device reading it would wait for the device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["AttentionKind", "attend", "choose_attention", "make_block_mask"]

AttentionKind = Literal["varlen", "mask"]

_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor longest, float scale)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "segment_attention_grad(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor bounds, Tensor longest, float scale) -> (Tensor, Tensor, Tensor)"
)


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKind:
    """``"varlen"`` where a kernel knows examples apart, else ``"mask"``."""
    if device.type == "cpu":
        return "varlen"
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    ):
        return "varlen"
    return "mask"


def make_block_mask(bounds: Tensor, tokens: int) -> Tensor:
    """True where a token may look: itself and earlier tokens of its own example.

    Args:
        bounds: Cumulative lengths, shape ``(examples + 1,)``.
        tokens: Number of tokens ``T``.

    Returns:
        Boolean, shape ``(1, 1, T, T)``.
    """
    positions = torch.arange(tokens, device=bounds.device)
    # (T,): the example each token is in; the first bound, 0, would shift the count by one.
    owner = torch.bucketize(positions, bounds[1:], right=True)
    mask = (owner[:, None] == owner[None, :]) & (positions[:, None] >= positions[None, :])
    return mask[None, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: Tensor, mask: Tensor | None
) -> Tensor:
    """Causal attention within each example, scaled by ``1 / sqrt(D)``.

    Args:
        q: Queries, shape ``(T, H, D)``.
        k: Keys, shape ``(T, G, D)``, each shared by ``H / G`` query heads.
        v: Values, shape ``(T, G, D)``.
        bounds: Cumulative lengths, int32, shape ``(examples + 1,)``; zero-length examples may
            follow the last one.
        longest: At least the longest length, int32, in host memory.
        mask: From :func:`make_block_mask` to use SDPA, else ``None``.

    Returns:
        Shape ``(T, H, D)``.
    """
    if mask is not None:
        # Grouped-query attention (Ainslie et al., arXiv:2305.13245): query head h reads key head
        # h // groups, so that each key head stands beside the queries it serves.
        groups = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), attn_mask=mask
        )
        return out[0].transpose(0, 1)
    scale = float(q.shape[2]) ** -0.5
    result: Tensor = torch.ops.qlora_kit.segment_attention(q, k, v, bounds, longest, scale)[0]
    return result


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    most = int(longest)
    # lse: the log of each row's softmax denominator, (H, T) in float32. The backward pass
    # recomputes probabilities from it instead of keeping (T, T) of them.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, most, most, 0.0, True, False, scale=scale
    )
    return out, lse


def _backward_cuda(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    most = int(longest)
    # Only read with dropout, which there is none of.
    unused = torch.empty((2,), dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, lse, bounds, bounds, most, most, 0.0, True, unused,
        unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _spans(bounds: Tensor) -> list[tuple[int, int]]:
    values = bounds.tolist()
    return [(start, end) for start, end in pairwise(values) if end > start]


def _as_batch(tensor: Tensor, start: int, end: int, repeats: int = 1) -> Tensor:
    part = tensor[start:end].transpose(0, 1)
    return (part.repeat_interleave(repeats, dim=0) if repeats > 1 else part)[None]


def _forward_segments(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    repeats = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=_lse_dtype(q.dtype), device=q.device)
    for start, end in _spans(bounds):
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _as_batch(q, start, end),
            _as_batch(k, start, end, repeats),
            _as_batch(v, start, end, repeats),
            0.0,
            True,
            scale=scale,
        )
        out[start:end] = part[0].transpose(0, 1)
        lse[start:end] = part_lse[0].T
    return out, lse


def _backward_segments(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    repeats = q.shape[1] // k.shape[1]
    grads = tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)
    )
    for start, end in _spans(bounds):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _as_batch(grad, start, end),
            _as_batch(q, start, end),
            _as_batch(k, start, end, repeats),
            _as_batch(v, start, end, repeats),
            _as_batch(out, start, end),
            lse[start:end].T[None],
            0.0,
            True,
            scale=scale,
        )
        for index, (whole, part) in enumerate(zip(grads, parts, strict=True)):
            heads = part[0]
            # (H, L, D) -> (G, L, D): a key head served several query heads, whose gradients add.
            if index > 0 and repeats > 1:
                heads = heads.unflatten(0, (-1, repeats)).sum(1)
            whole[start:end] = heads.transpose(0, 1)
    return grads[0], grads[1], grads[2]


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # FlashAttention's variable-length kernels keep (H, T), the loop over examples (T, H).
    shape = q.shape[:2] if q.device.type == "cpu" else (q.shape[1], q.shape[0])
    lse = torch.empty(shape, dtype=_lse_dtype(q.dtype), device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)
    )
    return q_grad, k_grad, v_grad


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, longest, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, longest)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, bounds, longest = ctx.saved_tensors
    grads = torch.ops.qlora_kit.segment_attention_grad(
        grad, q, k, v, out, lse, bounds, longest, ctx.scale
    )
    return (*grads, None, None, None)


_LIBRARY.impl("segment_attention", _forward_segments, "CPU")
_LIBRARY.impl("segment_attention_grad", _backward_segments, "CPU")
_LIBRARY.impl("segment_attention", _forward_cuda, "CUDA")
_LIBRARY.impl("segment_attention_grad", _backward_cuda, "CUDA")
torch.library.register_fake("qlora_kit::segment_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("qlora_kit::segment_attention_grad", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "qlora_kit::segment_attention", _backward, setup_context=_remember, lib=_LIBRARY
)
