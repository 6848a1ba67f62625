"""Loss, gradient and statistics of logits in two passes over memory, in place.

``torch.compile`` makes three passes and a second buffer of it, 10 of 590 ms per step of a
model with 152k tokens at 16,384 positions. Each program takes a row; running maxima and sums
per lane (online softmax, Milakov and Gimelshein, arXiv:1805.02867) are reduced once at the
end. Imported only where Triton runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kit.values import IGNORED_LABEL

__all__ = ["fused_softmax_step"]

# 4,096 logits for 8 warps are 16 a thread: enough loads in flight to cover a pass's latency.
_BLOCK = 4096


def fused_softmax_step(
    logits: Tensor, targets: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A :data:`loss.SoftmaxStep` that overwrites the logits with their gradient.

    Args:
        logits: Contiguous, shape ``(P, V)``; holds the gradient afterwards.
        targets: Shape ``(P,)``; rows of -100 count nothing.
        softcap: What logits are soft-capped at; 0 for no cap.
    """
    rows, columns = logits.shape
    sums = torch.empty((rows, 3), dtype=torch.float32, device=logits.device)
    if rows:
        _softmax_kernel[(rows,)](
            logits, targets, sums, columns, BLOCK=_BLOCK, IGNORED=IGNORED_LABEL,
            SOFTCAP=float(softcap), num_warps=8,
        )  # fmt: skip
    return logits, sums.sum(0)


@triton.jit  # type: ignore[untyped-decorator]
def _cap(score, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """``c tanh(s / c)``, by way of the sigmoid that every version of Triton has."""
    if SOFTCAP > 0.0:
        score = SOFTCAP * (2.0 * tl.sigmoid(2.0 * score / SOFTCAP) - 1.0)
    return score


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    sums,
    columns,
    BLOCK: tl.constexpr,  # noqa: N803
    IGNORED: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * columns
    target = tl.load(targets + row)
    counts = target != IGNORED
    place = tl.where(counts, target, 0)
    # Before the reductions, whose barriers keep it ahead of the second pass's writes.
    chosen = _cap(tl.load(base + place).to(tl.float32), SOFTCAP)
    lanes = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        mask = start + lanes < columns
        score = _cap(tl.load(base + start + lanes, mask, other=0.0).to(tl.float32), SOFTCAP)
        score = tl.where(mask, score, -3.0e38)
        # Each lane keeps the sums relative to its own maximum so far; a new maximum rescales
        # what was added up before, exp(old - new) <= 1.
        raised = tl.maximum(highest, score)
        scale = tl.exp(highest - raised)
        share = tl.where(mask, tl.exp(score - raised), 0.0)
        total = total * scale + share
        weighted = weighted * scale + share * score
        highest = raised
    # The lanes' sums on one footing, then across lanes; entropy = normalizer - sum p s.
    top = tl.max(highest, 0)
    factor = tl.exp(highest - top)
    total_all = tl.sum(total * factor, 0)
    mean = tl.sum(weighted * factor, 0) / total_all
    normalizer = top + tl.log(total_all)
    tl.store(sums + 3 * row, tl.where(counts, normalizer - chosen, 0.0))
    tl.store(sums + 3 * row + 1, tl.where(counts & (chosen >= top), 1.0, 0.0))
    tl.store(sums + 3 * row + 2, tl.where(counts, normalizer - mean, 0.0))
    for start in range(0, columns, BLOCK):
        mask = start + lanes < columns
        score = _cap(tl.load(base + start + lanes, mask, other=0.0).to(tl.float32), SOFTCAP)
        gradient = tl.exp(score - normalizer) - tl.where(start + lanes == place, 1.0, 0.0)
        if SOFTCAP > 0.0:
            # (c tanh(s / c))' = 1 - tanh(s / c)^2
            gradient *= 1.0 - (score / SOFTCAP) * (score / SOFTCAP)
        gradient = tl.where(counts, gradient, 0.0)
        tl.store(base + start + lanes, gradient.to(logits.dtype.element_ty), mask)
