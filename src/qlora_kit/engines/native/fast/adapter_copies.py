"""Working copies of the adapters: cast once per step, gradients gathered in float32.

peft's float32 parameters stay what the optimizer steps. All layers' adapters of one kind lie
in one buffer, so that casting them, adding up their gradients and clearing them takes a few
dozen kernels for the whole model instead of several per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.peft_layers import AdapterPart, GroupReader

__all__ = ["AdapterCopies", "Gathered", "make_adapter_copies"]


class Gathered(Protocol):
    """What trains outside of autograd's own gradients: read per step, gathered in wide buffers."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients are gathered in."""

    @property
    def gradient_count(self) -> int:
        """How many numbers the gathered gradients have."""

    def nbytes(self) -> int:
        """Bytes of copies and of gathered gradients."""

    def place_gradients(self, buffer: Tensor) -> None:
        """Gather gradients in a buffer of :attr:`gradient_count` numbers from now on."""

    def refresh(self) -> None:
        """Take the parameters' present values."""

    def clear_gradients(self) -> None:
        """Start a step."""

    def gather_gradients(self) -> None:
        """Add a micro-batch's gradients to the gathered ones."""

    def drop_gradients(self) -> None:
        """Forget a micro-batch's gradients."""

    def publish_gradients(self) -> None:
        """Make the gathered gradients the parameters' own."""


class AdapterCopies:
    """The adapters of several groups with the same shapes, usually one group per layer.

    Attributes:
        down: For each group the LoRA A matrices one above the other, shape ``(R, K)``.
        up: For each group the scaled LoRA B matrices as a block-diagonal matrix ``(N, R)``.
    """

    def __init__(self, groups: Sequence[GroupReader], dtype: torch.dtype) -> None:
        first = groups[0]
        device = first.weights[0].device
        self._groups = groups
        ranks = [0 if part is None else part.down.shape[0] for part in first.adapters]
        total_rank, total_rows, count = sum(ranks), sum(first.rows), len(groups)
        down = torch.zeros((count, total_rank, first.columns), dtype=dtype, device=device)
        up = torch.zeros((count, total_rows, total_rank), dtype=dtype, device=device)
        self._down_all, self._up_all = down, up
        self._down_grad = torch.zeros(down.shape, dtype=_wide(dtype), device=device)
        self.down = [layer.requires_grad_() for layer in down.unbind()]
        self.up = [layer.requires_grad_() for layer in up.unbind()]
        self._slots: list[_Slot] = []
        rank = row = 0
        for index, (r, rows) in enumerate(zip(ranks, first.rows, strict=True)):
            if r:
                parts = [group.adapters[index] for group in groups]
                slot = _Slot([part for part in parts if part is not None], rank, row)
                slot.up_grad = torch.zeros((count, rows, r), dtype=_wide(dtype), device=device)
                self._slots.append(slot)
            rank, row = rank + r, row + rows

    def nbytes(self) -> int:
        """Bytes of the copies and of the gathered gradients."""
        tensors = [self._down_all, self._up_all, self._down_grad]
        tensors += [slot.up_grad for slot in self._slots]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients are gathered in."""
        return self._down_grad.dtype

    @property
    def gradient_count(self) -> int:
        """How many numbers the gathered gradients have."""
        count: int = sum(slot.up_grad.numel() for slot in self._slots) + self._down_grad.numel()
        return count

    def place_gradients(self, buffer: Tensor) -> None:
        """Gather gradients in a buffer of :attr:`gradient_count` numbers from now on."""
        sizes = [self._down_grad.numel(), *(slot.up_grad.numel() for slot in self._slots)]
        down, *up = buffer.split(sizes)
        self._down_grad = down.view(self._down_grad.shape)
        for slot, part in zip(self._slots, up, strict=True):
            slot.up_grad = part.view(slot.up_grad.shape)

    def refresh(self) -> None:
        """Copy the parameters' present values, scaled and cast."""
        for slot in self._slots:
            down = torch.stack([part.down.detach() for part in slot.parts])
            self._down_all.data[:, slot.ranks].copy_(down)
            # B carries the scaling: a multiplication of (N, r) once a step, not of (T, N) per
            # micro-batch; its gradient is scaled back when it is gathered.
            up = torch.stack([part.up.detach() for part in slot.parts])
            if slot.scaling != 1.0:
                up *= slot.scaling
            self._up_all.data[:, slot.rows, slot.ranks].copy_(up)

    def clear_gradients(self) -> None:
        """Start a step: gathered gradients to zero."""
        self._down_grad.zero_()
        for slot in self._slots:
            slot.up_grad.zero_()

    def gather_gradients(self) -> None:
        """Add the copies' gradients to the gathered ones and drop them."""
        down = _stack_gradients(self.down)
        if down is not None:
            self._down_grad += down
        up = _stack_gradients(self.up)
        if up is not None:
            for slot in self._slots:
                slot.up_grad.add_(up[:, slot.rows, slot.ranks], alpha=slot.scaling)

    def drop_gradients(self) -> None:
        """Forget the copies' gradients."""
        for leaf in (*self.down, *self.up):
            leaf.grad = None

    def publish_gradients(self) -> None:
        """Make the gathered gradients the parameters' own."""
        for slot in self._slots:
            for index, part in enumerate(slot.parts):
                if part.down.requires_grad:
                    part.down.grad = self._down_grad[index, slot.ranks].to(part.down.dtype)
                if part.up.requires_grad:
                    part.up.grad = slot.up_grad[index].to(part.up.dtype)


class _Slot:
    """Where one projection's adapter lies among its copies."""

    up_grad: Tensor

    def __init__(self, parts: list[AdapterPart], rank: int, row: int) -> None:
        self.parts = parts
        self.scaling = parts[0].scaling
        self.ranks = slice(rank, rank + parts[0].down.shape[0])
        self.rows = slice(row, row + parts[0].up.shape[0])


def make_adapter_copies(
    groups: Sequence[GroupReader], dtype: torch.dtype
) -> tuple[list[AdapterCopies], dict[int, tuple[Tensor, Tensor]]]:
    """Copies for groups of any mixture of shapes.

    Returns:
        The copies, and each group's ``(down, up)`` by ``id(group)``; groups without adapters have
        none.
    """
    alike: dict[object, list[GroupReader]] = {}
    for group in groups:
        key = (
            tuple(group.rows),
            group.columns,
            tuple(
                None if part is None else (part.down.shape[0], part.scaling, part.down.dtype)
                for part in group.adapters
            ),
        )
        if any(part is not None for part in group.adapters):
            alike.setdefault(key, []).append(group)
    adapter_copies, places = [], {}
    for members in alike.values():
        copies = AdapterCopies(members, dtype)
        adapter_copies.append(copies)
        for group, down, up in zip(members, copies.down, copies.up, strict=True):
            places[id(group)] = (down, up)
    return adapter_copies, places


def _stack_gradients(leaves: Sequence[Tensor]) -> Tensor | None:
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    if all(gradient is None for gradient in gradients):
        return None
    return torch.stack(
        [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
