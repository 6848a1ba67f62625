"""Gradients of all ranks, added up in one buffer with one call per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from qlora_kit.engines.native.fast.adapter_copies import Gathered

__all__ = ["RankSum"]

# Behind the gradients: loss, trained tokens, hits, entropy, tokens.
_TAIL = 5


class RankSum:
    """One flat buffer that holds every gradient of a step, and the sums that go with them.

    DDP would do in many calls what one does here, and would not see these gradients, which are
    assigned and not accumulated by autograd.

    Args:
        copies: What gathers gradients, which lie in this buffer from now on.
        others: Parameters that train outside of them, through peft's own modules.
        device: Where all of it lies.
    """

    def __init__(
        self, copies: Sequence[Gathered], others: Sequence[Tensor], device: torch.device
    ) -> None:
        wide = {one.gradient_dtype for one in copies} | {torch.float32}
        counts = [one.gradient_count for one in copies] + [one.numel() for one in others]
        dtype = torch.float64 if torch.float64 in wide else torch.float32
        self._flat = torch.zeros(sum(counts) + _TAIL, dtype=dtype, device=device)
        views = self._flat[:-_TAIL].split(counts)
        for one, view in zip(copies, views, strict=False):
            one.place_gradients(view)
        self._others = list(zip(others, views[len(copies) :], strict=True))

    def add_up(
        self, trained: int, tokens: int, loss: Tensor, stats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn this rank's gradients into those of the mean over every rank's trained tokens.

        Args:
            trained: This rank's trained tokens, which its gradients are the mean over; may be 0.
            tokens: This rank's tokens.
            loss: Mean loss over this rank's trained tokens.
            stats: ``[hits, entropy]``, summed over them.

        Returns:
            The mean loss, hits and entropy per trained token, and the number of tokens, of all
            ranks alike and on the device.
        """
        for parameter, view in self._others:
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad.reshape(-1))
        # Sums, not means: ranks have different numbers of tokens.
        self._flat *= trained
        tail = self._flat[-_TAIL:]
        tail[0] = loss * trained
        tail[1].fill_(trained)
        tail[2:4] = stats
        tail[4].fill_(tokens)
        distributed.all_reduce(self._flat)
        everyone = tail[1].clamp(min=1).clone()
        all_tokens = tail[4].clone()
        self._flat /= everyone
        for parameter, view in self._others:
            parameter.grad = view.reshape(parameter.shape).to(parameter.dtype)
        # A copy: the buffer is the next step's too.
        means = tail.to(torch.float32, copy=True)
        return means[0], means[2:4], all_tokens
