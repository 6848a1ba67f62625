"""Cross-entropy of a frozen language-model head without the logits of a whole batch.

Logits exist for a chunk of trained positions at a time, and their gradient is turned into
the hidden states' gradient at once, in the forward pass, as in Liger-Kernel's fused linear
cross-entropy (Hsu et al., arXiv:2410.10989). Positions without loss never get here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_kit.values import IGNORED_LABEL

__all__ = ["SoftmaxStep", "linear_cross_entropy", "plain_softmax_step", "softmax_step"]

#: From logits ``(P, V)`` and targets ``(P,)``: the gradient of the summed loss with respect to
#: the logits, which may take their place, and ``[loss, hits, entropy]``, each summed over the
#: positions.
SoftmaxStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, step: SoftmaxStep | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: Final hidden states of the trained positions, shape ``(P, H)``.
        weight: The head's weight, shape ``(V, H)``; gets no gradient.
        targets: Shape ``(P,)``; positions of -100 count nothing.
        chunk: Positions whose logits exist at the same time.
        step: :func:`plain_softmax_step`, or :func:`softmax_step` compiled.

    Returns:
        The loss as a float32 scalar, and ``[hits, entropy]`` without gradient: how many targets
        were the likeliest token, and the predictions' summed entropy in nats.
    """
    step = step or plain_softmax_step
    loss, stats = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, step)
    return loss, stats


def softmax_step(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """See :data:`SoftmaxStep`; float32 arithmetic whatever the logits' dtype, to be compiled."""
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    scores = logits.to(dtype)
    counts = targets != IGNORED_LABEL
    places = torch.where(counts, targets, 0)[:, None]
    chosen = scores.gather(1, places)
    # log sum exp(s) = m + log sum exp(s - m): with the maximum m taken out nothing overflows.
    highest = scores.amax(1, keepdim=True)
    raised = (scores - highest).exp()
    total = raised.sum(1, keepdim=True)
    normalizer = highest + total.log()
    # Entropy is -sum p log p = normalizer - sum p s, since log p = s - normalizer.
    weighted = (raised * scores).sum(1, keepdim=True) / total
    # d(normalizer - s_target)/ds = p - 1[target]. A comparison rather than a scatter, which
    # would keep the compiler from fusing all of this into one pass.
    one = torch.arange(logits.shape[1], device=logits.device)[None] == places
    gradient = torch.where(counts[:, None], raised / total - one.to(dtype), 0.0).to(logits.dtype)
    kept = counts[:, None].to(dtype)
    sums = torch.stack(
        [
            ((normalizer - chosen) * kept).sum(),
            ((chosen >= highest).to(dtype) * kept).sum(),
            ((normalizer - weighted) * kept).sum(),
        ]
    )
    return gradient, sums


def plain_softmax_step(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same as :func:`softmax_step` with few passes over memory when nothing is compiled."""
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    counts = targets != IGNORED_LABEL
    places = torch.where(counts, targets, 0)[:, None]
    kept = counts[:, None].to(dtype)
    log_probabilities = torch.log_softmax(logits, dim=1, dtype=dtype)
    chosen = log_probabilities.gather(1, places)
    hits = chosen >= log_probabilities.amax(1, keepdim=True)
    gradient = log_probabilities.exp()
    entropy = -torch.bmm(gradient[:, None], log_probabilities[:, :, None])[:, 0]
    gradient.scatter_add_(1, places, torch.full_like(kept, -1.0)).mul_(kept)
    sums = [-(chosen * kept).sum(), (hits.to(dtype) * kept).sum(), (entropy * kept).sum()]
    return gradient.to(logits.dtype), torch.stack(sums)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, step: SoftmaxStep
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        hidden_grad = torch.empty_like(hidden) if wants_grad else None
        sums = torch.zeros(
            3,
            dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
            device=hidden.device,
        )
        # (P, H) in pieces of `chunk` rows: logits (chunk, V) and their gradient exist once, and
        # (chunk, V)(V, H) -> (chunk, H) leaves what the decoder's backward pass begins with.
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            gradient, part_sums = step(hidden[part] @ weight.T, targets[part])
            sums += part_sums
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
        if hidden_grad is not None:
            ctx.save_for_backward(hidden_grad)
        stats = sums[1:].clone()
        ctx.mark_non_differentiable(stats)
        return sums[0].clone(), stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        (hidden_grad,) = ctx.saved_tensors
        # Late: 1 / trained tokens would have pushed fp16's small gradients out of its range.
        return (hidden_grad * grad).to(hidden_grad.dtype), None, None, None, None
