"""Causal attention over several examples laid end to end, none of which sees another.

On CUDA one variable-length FlashAttention call (the kernels behind
``torch.nn.attention.varlen``, Dao, arXiv:2307.08691) with cumulative lengths of fixed shape
and grouped keys and values as they are. On a CPU one FlashAttention call per example.
Elsewhere, and on cards older than Ampere, one SDPA call with a block-diagonal mask. Soft-capped
scores go through :mod:`capped_kernels` on CUDA and :mod:`capped_attention` elsewhere.

The longest length, like a window, is a tensor in host memory: as a number it would make
``torch.compile`` build a new graph for each value, and on the device reading it would wait for the
device.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.capped_attention import attend_capped
from qlora_kit.engines.native.layers.segment_attention import (
    attend_segments,
    attend_segments_backward,
    lse_dtype,
)

__all__ = ["AttentionKind", "attend", "choose_attention", "make_block_mask"]

AttentionKind = Literal["varlen", "mask"]

_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor longest, "
    "Tensor? window, float scale, float softcap) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "segment_attention_grad(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor bounds, Tensor longest, Tensor? window, float scale, float softcap)"
    " -> (Tensor, Tensor, Tensor)"
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


def make_block_mask(bounds: Tensor, tokens: int, window: int = 0) -> Tensor:
    """True where a token may look: itself and earlier tokens of its own example.

    Args:
        bounds: Cumulative lengths, shape ``(examples + 1,)``.
        tokens: Number of tokens ``T``.
        window: How many tokens, itself included, it may look at; 0 for all of them.

    Returns:
        Boolean, shape ``(1, 1, T, T)``.
    """
    positions = torch.arange(tokens, device=bounds.device)
    # (T,): the example each token is in; the first bound, 0, would shift the count by one.
    owner = torch.bucketize(positions, bounds[1:], right=True)
    mask = (owner[:, None] == owner[None, :]) & (positions[:, None] >= positions[None, :])
    if window:
        mask &= positions[None, :] > positions[:, None] - window
    return mask[None, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: Tensor,
    mask: Tensor | None,
    *,
    window: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention within each example.

    Args:
        q: Queries, shape ``(T, H, D)``.
        k: Keys, shape ``(T, G, D)``, each shared by ``H / G`` query heads.
        v: Values, shape ``(T, G, D)``.
        bounds: Cumulative lengths, int32, shape ``(examples + 1,)``; zero-length examples may
            follow the last one.
        longest: At least the longest length, int32, in host memory.
        mask: From :func:`make_block_mask` to use SDPA, else ``None``.
        window: How many tokens, itself included, one may look at, in host memory; 0 or ``None``
            for all. Where there is a mask, it says that already.
        scale: What scores are multiplied with, ``1 / sqrt(D)`` by default.
        softcap: What scores are soft-capped at, 0 for no cap; see :mod:`capped_attention`.

    Returns:
        Shape ``(T, H, D)``.
    """
    scale = float(q.shape[2]) ** -0.5 if scale is None else scale
    if mask is not None:
        # Grouped-query attention (Ainslie et al., arXiv:2305.13245): query head h reads key head
        # h // groups, so that each key head stands beside the queries it serves.
        groups = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        if softcap:
            return attend_capped(q, k, v, mask[0, 0], scale, softcap).transpose(0, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, scale=scale
        )
        return out[0].transpose(0, 1)
    result: Tensor = torch.ops.qlora_kit.segment_attention(
        q, k, v, bounds, longest, window, scale, softcap
    )[0]
    return result


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    most = int(longest)
    if softcap:
        from qlora_kit.engines.native.layers.capped_kernels import capped_segments

        reach = 0 if window is None else int(window)
        return capped_segments(q, k, v, bounds, most, reach, scale, softcap)
    # lse: the log of each row's softmax denominator, (H, T) in float32. The backward pass
    # recomputes probabilities from it instead of keeping (T, T) of them.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, most, most, 0.0, True, False, scale=scale,
        **_as_window(window),
    )  # fmt: skip
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
    window: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    most = int(longest)
    if softcap:
        from qlora_kit.engines.native.layers.capped_kernels import capped_segments_backward

        reach = 0 if window is None else int(window)
        return capped_segments_backward(
            grad, q, k, v, out, lse, bounds, most, reach, scale, softcap
        )
    # Only read with dropout, which there is none of.
    unused = torch.empty((2,), dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, lse, bounds, bounds, most, most, 0.0, True, unused,
        unused, scale=scale, **_as_window(window),
    )  # fmt: skip
    return dq, dk, dv


def _as_window(window: Tensor | None) -> dict[str, int]:
    """FlashAttention counts the tokens before the one that looks."""
    reach = 0 if window is None else int(window)
    return {"window_size_left": reach - 1, "window_size_right": 0} if reach else {}


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # FlashAttention's variable-length kernels keep (H, T), the loop over examples (T, H).
    shape = q.shape[:2] if q.device.type == "cpu" else (q.shape[1], q.shape[0])
    lse = torch.empty(shape, dtype=lse_dtype(q.dtype), device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)
    )
    return q_grad, k_grad, v_grad


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, longest, window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, longest, window)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    grads = torch.ops.qlora_kit.segment_attention_grad(
        grad, *ctx.saved_tensors, ctx.scale, ctx.softcap
    )
    return (*grads, None, None, None, None, None)


_LIBRARY.impl("segment_attention", attend_segments, "CPU")
_LIBRARY.impl("segment_attention_grad", attend_segments_backward, "CPU")
_LIBRARY.impl("segment_attention", _forward_cuda, "CUDA")
_LIBRARY.impl("segment_attention_grad", _backward_cuda, "CUDA")
torch.library.register_fake("qlora_kit::segment_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("qlora_kit::segment_attention_grad", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "qlora_kit::segment_attention", _backward, setup_context=_remember, lib=_LIBRARY
)
