"""A group of projections whose adapters drop numbers of their input, each its own.

The frozen weights see the input whole; every adapter sees it through a mask of its own, drawn in
the order and shape in which peft's modules draw theirs, so that a seed gives the same masks where
nothing is compiled. Both are rounded once, as in :mod:`projection`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.projection import dequantize, sum_products

__all__ = ["project_dropped"]

_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "low_linear(Tensor x, Tensor low, Tensor[] weights, Tensor[] scales, int[] rows, "
    "int blocksize, str quant_type, Tensor? bias, Tensor up) -> Tensor"
)


def project_dropped(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    rows: list[int],
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    dropouts: tuple[tuple[int, float], ...],
) -> Tensor:
    """``x @ W.T + bias + low @ up.T``, where ``low`` is of what each adapter sees of ``x``.

    Args:
        x: As in :func:`projection.project`, like all that follow.
        weights: The same.
        scales: The same.
        rows: The same.
        blocksize: The same.
        quant_type: The same.
        bias: The same.
        down: The same.
        up: The same.
        dropouts: Rank and probability of each adapter, in the order of ``down``.

    Returns:
        Shape ``(T, N)``.
    """
    parts = [
        torch.nn.functional.dropout(x, probability) @ own.T
        for own, (_, probability) in zip(
            down.split([rank for rank, _ in dropouts]), dropouts, strict=True
        )
    ]
    low = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    out: Tensor = torch.ops.qlora_kit.low_linear(
        x, low, weights, scales, rows, blocksize, quant_type, bias, up
    )
    return out


def _low_linear(
    x: Tensor,
    low: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    rows: list[int],
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    up: Tensor,
) -> Tensor:
    weight = dequantize(weights, scales, rows, x.shape[1], blocksize, quant_type, x.dtype)
    return sum_products(x, weight.T, low, up.T, bias)


def _low_linear_fake(
    x: Tensor, low: Tensor, weights: Any, scales: Any, rows: list[int], *rest: Any
) -> Tensor:
    return x.new_empty((x.shape[0], sum(rows)))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, low, weights, scales, rows, blocksize, quant_type, _, up = inputs
    ctx.count = len(weights)
    ctx.settings = (rows, x.shape[1], blocksize, quant_type)
    ctx.save_for_backward(low, up, *weights, *scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    low, up, *frozen = ctx.saved_tensors
    weights, scales = frozen[: ctx.count], frozen[ctx.count :]
    rows, columns, blocksize, quant_type = ctx.settings
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_kit.lora_linear_grad(
            grad, weights, scales, rows, columns, blocksize, quant_type, None, None
        )
    none = ([None] * len(weights), [None] * len(scales))
    return grad_x, grad @ up, *none, None, None, None, None, grad.T @ low


_LIBRARY.impl("low_linear", _low_linear, "CompositeExplicitAutograd")
torch.library.register_fake("qlora_kit::low_linear", _low_linear_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "qlora_kit::low_linear", _backward, setup_context=_remember, lib=_LIBRARY
)
