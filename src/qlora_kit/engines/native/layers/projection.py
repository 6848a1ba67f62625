"""Frozen quantized weights and their LoRA adapters as one differentiable operation.

Projections with the same input (q/k/v, gate/up) form a group: their weights are dequantized
into one matrix and multiplied once, their adapters lie side by side in ``down`` and block by
block in ``up``. Both passes are opaque to ``torch.compile``: it would otherwise merge the
dequantization of the forward and the backward pass and keep every dequantized weight alive
in between. Method: QLoRA, Dettmers et al., arXiv:2305.14314.

Works on plain tensors; :mod:`.peft_layers` finds them in a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["dequantize", "fill_joined", "join", "project", "rounds_before_adding", "sum_products"]

_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")

_LIBRARY.define(
    "lora_linear(Tensor x, Tensor[] weights, Tensor[] scales, int[] rows, int blocksize, "
    "str quant_type, Tensor? bias, Tensor? down, Tensor? up) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_grad(Tensor grad, Tensor[] weights, Tensor[] scales, int[] rows, int columns, "
    "int blocksize, str quant_type, Tensor? low_grad, Tensor? down) -> Tensor"
)


def project(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    rows: list[int],
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """``x @ W.T + bias + (x @ down.T) @ up.T`` for a group of frozen weights.

    Args:
        x: Input, shape ``(T, K)``, in the compute dtype.
        weights: Packed 4-bit weights, one per projection; or, when ``scales`` is empty, 16/32-bit
            matrices of ``N`` rows altogether and ``K`` columns, or one that :func:`join` made
            and :func:`fill_joined` filled.
        scales: Each weight's block maxima, float32, already dequantized.
        rows: Output features of each projection; they add up to ``N``.
        blocksize: Weights per block maximum.
        quant_type: ``"nf4"`` or ``"fp4"``.
        bias: Shape ``(N,)``, frozen; or ``None``.
        down: LoRA A matrices one above the other, shape ``(R, K)``; or ``None``.
        up: LoRA B matrices, scaled, as a block-diagonal matrix of shape ``(N, R)``; or ``None``.

    Returns:
        Shape ``(T, N)``. Gradients reach ``x``, ``down`` and ``up``; in ``up`` also outside its
        blocks, where they mean nothing.
    """
    out: Tensor = torch.ops.qlora_kit.lora_linear(
        x, weights, scales, rows, blocksize, quant_type, bias, down, up
    )[0]
    return out


def rounds_before_adding(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product that is added to what is there (``addmm``) is rounded before.

    cuBLAS does in 16 bits, at all sizes but a few: 7 to 11% of an update of 1/6,000 of the
    product's size arrived on an H200 (2026-11-28).
    """
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def join(weight: Tensor, rank: int) -> Tensor:
    """A weight with room for its adapters, so that one product takes both.

    Args:
        weight: Shape ``(N, K)``.
        rank: The adapters' ``R``.

    Returns:
        Shape ``(N + R', K + R')``, where ``R'`` is ``R`` rounded up to a multiple of eight: the
        weight, zeros beside it for ``up`` and zeros below it for ``down``, which
        :func:`fill_joined` sets. A weight for :func:`project` as it is.
    """
    rows, columns = weight.shape
    padded = _pad_rank(rank)
    joined = weight.new_zeros((rows + padded, columns + padded))
    joined[:rows, :columns] = weight
    return joined


def fill_joined(joined: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Copy ``(down, up)`` into their places in weights that :func:`join` made.

    Args:
        joined: The weights, each with its ``down`` and ``up``.
    """
    places = [
        place
        for whole, down, up in joined
        for place in (
            whole[len(up) : len(up) + len(down), : down.shape[1]],
            whole[: len(up), down.shape[1] : down.shape[1] + len(down)],
        )
    ]
    torch._foreach_copy_(places, [one.detach() for _, down, up in joined for one in (down, up)])


def _pad_rank(rank: int) -> int:
    # Rows of 16 bytes are what tensor cores read quickly.
    return -(-rank // 8) * 8


def dequantize(
    weights: list[Tensor],
    scales: list[Tensor],
    rows: list[int],
    columns: int,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """A group's weights as one matrix of shape ``(sum(rows), columns)``."""
    if not scales:
        return weights[0] if len(weights) == 1 else torch.cat(weights)
    ops = torch.ops.bitsandbytes
    if len(weights) == 1 or weights[0].device.type != "cuda":
        parts = [
            ops.dequantize_4bit(weight, scale, blocksize, quant_type, [row, columns], dtype)
            for weight, scale, row in zip(weights, scales, rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    # Straight into its rows of the whole: concatenating would copy every weight once more.
    out = torch.empty((sum(rows), columns), dtype=dtype, device=weights[0].device)
    start = 0
    for weight, scale, row in zip(weights, scales, rows, strict=True):
        ops.dequantize_4bit.out(
            weight, scale, blocksize, quant_type, [row, columns], dtype,
            out=out[start : start + row],
        )  # fmt: skip
        start += row
    return out


def _lora_linear(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    rows: list[int],
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weight = dequantize(weights, scales, rows, x.shape[1], blocksize, quant_type, x.dtype)
    if down is None or up is None:
        return torch.nn.functional.linear(x, weight, bias), x.new_empty((0, 0))
    low = x @ down.T
    return sum_products(x, weight.T, low, up.T, bias), low


def sum_products(
    x: Tensor, weight: Tensor, low: Tensor, small: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x @ weight + low @ small + bias``, rounded once; ``weight`` may be a joined one.

    Added to a rounded product, most of an update below half a step of bfloat16 is lost, which
    slows learning down. Biases, which may be large, come last.
    """
    inputs, outputs = x.shape[1], small.shape[1]
    if not rounds_before_adding(x.device, x.dtype):
        # The small product first: the large one adds to it before it is rounded.
        out = (low @ small).addmm_(x, weight[:inputs, :outputs])
    elif 3 * outputs > inputs:
        # A single sum leaves cuBLAS no choice, at the price of a copy of the factors.
        gap = _pad_rank(low.shape[1]) - low.shape[1]
        wide = torch.cat((x, low, low.new_zeros((len(low), gap))), dim=1)
        if len(weight) == inputs:
            weight = _put_below(weight, torch.nn.functional.pad(small, (0, 0, 0, gap)))
        out = wide @ weight[:, :outputs]
    else:
        # Where those are wide and the sum is narrow, a sum in float32 costs less.
        total = torch.mm(low, small, out_dtype=torch.float32)
        total = torch.addmm(total, x, weight[:inputs, :outputs], out_dtype=torch.float32)
        return (total if bias is None else total.add_(bias)).to(x.dtype)
    return out if bias is None else out.add_(bias)


def _put_below(weight: Tensor, small: Tensor) -> Tensor:
    """``small``'s rows under those of ``weight``, in the order in which ``weight`` lies."""
    if weight.stride(0) == 1:
        return torch.cat((weight.T, small.T), dim=1).T
    return torch.cat((weight, small))


def _lora_linear_fake(
    x: Tensor, weights: Any, scales: Any, rows: list[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    down = rest[3]
    low = x.new_empty((0, 0)) if down is None else x.new_empty((x.shape[0], down.shape[0]))
    return x.new_empty((x.shape[0], sum(rows))), low


def _lora_linear_grad(
    grad: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    rows: list[int],
    columns: int,
    blocksize: int,
    quant_type: str,
    low_grad: Tensor | None,
    down: Tensor | None,
) -> Tensor:
    weight = dequantize(weights, scales, rows, columns, blocksize, quant_type, grad.dtype)
    if low_grad is None or down is None:
        return grad @ weight
    return sum_products(grad, weight, low_grad, down)


def _lora_linear_grad_fake(
    grad: Tensor, weights: Any, scales: Any, rows: Any, columns: int, *rest: Any
) -> Tensor:
    return grad.new_empty((grad.shape[0], columns))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, scales, rows, blocksize, quant_type, _, down, up = inputs
    ctx.has_adapter = down is not None and up is not None
    ctx.count = len(weights)
    ctx.settings = (rows, x.shape[1], blocksize, quant_type)
    adapter = (x, output[1], down, up) if ctx.has_adapter else ()
    ctx.save_for_backward(*weights, *scales, *adapter)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    adapter = saved[-4:] if ctx.has_adapter else []
    tensors = saved[: len(saved) - len(adapter)]
    weights, scales = tensors[: ctx.count], tensors[ctx.count :]
    rows, columns, blocksize, quant_type = ctx.settings
    grad_down = grad_up = low_grad = down = None
    if ctx.has_adapter:
        # With y = x W' + low up' and low = x down': the chain rule, smallest products first.
        # (T, N)(N, R) -> (T, R); (R, T)(T, K) -> (R, K); (N, T)(T, R) -> (N, R). W never gets a
        # gradient, so none of the products is as large as the forward pass's but the last.
        x, low, down, up = adapter
        low_grad = grad @ up
        grad_down = low_grad.T @ x
        grad_up = grad.T @ low
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_kit.lora_linear_grad(
            grad, weights, scales, rows, columns, blocksize, quant_type, low_grad, down
        )
    # Autograd wants a list of nothing where a list went in.
    none = ([None] * len(weights), [None] * len(scales))
    return grad_x, *none, None, None, None, None, grad_down, grad_up


_LIBRARY.impl("lora_linear", _lora_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_linear_grad", _lora_linear_grad, "CompositeExplicitAutograd")
torch.library.register_fake("qlora_kit::lora_linear", _lora_linear_fake, lib=_LIBRARY)
torch.library.register_fake("qlora_kit::lora_linear_grad", _lora_linear_grad_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "qlora_kit::lora_linear", _backward, setup_context=_remember, lib=_LIBRARY
)
