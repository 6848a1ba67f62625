"""Weights that show their shape and hold nothing: another process has them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["is_absent", "make_absent"]


def make_absent(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of the same shape and dtype that takes the memory of one number.

    Whoever computes with it all the same gets no numbers: floating-point ones are NaN.
    """
    import torch

    filler = math.nan if tensor.is_floating_point() else 0
    one = torch.full((), filler, dtype=tensor.dtype, device=device or tensor.device)
    return one.expand(tensor.shape)


def is_absent(tensor: Any) -> bool:
    """Whether a tensor was made by :func:`make_absent`, or is a view of such a one."""
    if tensor.device.type == "meta":
        return False
    nbytes: int = tensor.untyped_storage().nbytes()
    shown: int = tensor.numel() * tensor.element_size()
    return nbytes < shown
