"""Cross-entropy of a language-model head without the logits of a whole batch.

Logits exist for a chunk of trained positions at a time, and their gradient is turned into
the hidden states' gradient, and a trained head's, at once, in the forward pass, as in
Liger-Kernel's fused linear cross-entropy (Hsu et al., arXiv:2410.10989). Positions without loss
never get here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_kit.values import IGNORED_LABEL

__all__ = [
    "SoftmaxStep",
    "linear_cross_entropy",
    "module_cross_entropy",
    "plain_softmax_step",
    "softmax_step",
]

#: From logits ``(P, V)``, targets ``(P,)`` and what the logits are soft-capped at (0 for no cap):
#: the gradient of the summed loss with respect to the logits as they came, which may take their
#: place, and ``[loss, hits, entropy]``, each summed over the positions.
SoftmaxStep = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]

#: Takes the gradient of a chunk's logits ``(P, V)`` and the hidden states ``(P, H)`` they are of.
Gather = Callable[[Tensor, Tensor], None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    step: SoftmaxStep | None = None,
    gather: Gather | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: Final hidden states of the trained positions, shape ``(P, H)``.
        weight: The head's weight, shape ``(V, H)``; gets no gradient by itself.
        targets: Shape ``(P,)``; positions of -100 count nothing.
        chunk: Positions whose logits exist at the same time.
        step: :func:`plain_softmax_step`, or :func:`softmax_step` compiled.
        gather: Called for every chunk where gradients are wanted; makes a trained head's.
        softcap: What logits are soft-capped at, ``c tanh(s / c)``; 0 for no cap.

    Returns:
        The loss as a float32 scalar, and ``[hits, entropy]`` without gradient: how many targets
        were the likeliest token, and the predictions' summed entropy in nats.
    """
    step = step or plain_softmax_step
    loss, stats = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, step, gather, softcap)
    return loss, stats


def module_cross_entropy(
    hidden: Tensor,
    head: Any,
    targets: Tensor,
    chunk: int,
    step: SoftmaxStep,
    share: Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same for a head that is called: adapted, quantized, or with a bias.

    Args:
        hidden: As in :func:`linear_cross_entropy`, like ``targets``, ``chunk`` and ``step``.
        head: A module whose trained parameters get their gradients here.
        targets: The same.
        chunk: The same.
        step: The same.
        share: What the summed loss is multiplied by, a scalar tensor.
        scale: What the head's output is multiplied by.
        softcap: As in :func:`linear_cross_entropy`, of what was multiplied.
    """
    loss, stats = _ModuleCrossEntropy.apply(
        hidden, head, targets, chunk, step, share, scale, softcap
    )
    return loss, stats


def softmax_step(logits: Tensor, targets: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """See :data:`SoftmaxStep`; float32 arithmetic whatever the logits' dtype, to be compiled."""
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    scores = logits.to(dtype)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
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
    gradient = torch.where(counts[:, None], raised / total - one.to(dtype), 0.0)
    if softcap:
        # (c tanh(s / c))' = 1 - tanh(s / c)^2
        gradient = gradient * (1 - (scores / softcap).square())
    kept = counts[:, None].to(dtype)
    sums = torch.stack(
        [
            ((normalizer - chosen) * kept).sum(),
            ((chosen >= highest).to(dtype) * kept).sum(),
            ((normalizer - weighted) * kept).sum(),
        ]
    )
    return gradient.to(logits.dtype), sums


def plain_softmax_step(
    logits: Tensor, targets: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same as :func:`softmax_step` with few passes over memory when nothing is compiled."""
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    counts = targets != IGNORED_LABEL
    places = torch.where(counts, targets, 0)[:, None]
    kept = counts[:, None].to(dtype)
    cap = torch.tanh(logits.to(dtype) / softcap) if softcap else None
    scores = logits if cap is None else cap * softcap
    log_probabilities = torch.log_softmax(scores, dim=1, dtype=dtype)
    chosen = log_probabilities.gather(1, places)
    hits = chosen >= log_probabilities.amax(1, keepdim=True)
    gradient = log_probabilities.exp()
    entropy = -torch.bmm(gradient[:, None], log_probabilities[:, :, None])[:, 0]
    gradient.scatter_add_(1, places, torch.full_like(kept, -1.0)).mul_(kept)
    if cap is not None:
        gradient.mul_(1 - cap.square_())
    sums = [-(chosen * kept).sum(), (hits.to(dtype) * kept).sum(), (entropy * kept).sum()]
    return gradient.to(logits.dtype), torch.stack(sums)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        step: SoftmaxStep,
        gather: Gather | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        hidden_grad = torch.empty_like(hidden) if wants_grad else None
        sums = _make_sums(hidden)
        # (P, H) in pieces of `chunk` rows: logits (chunk, V) and their gradient exist once, and
        # (chunk, V)(V, H) -> (chunk, H) leaves what the decoder's backward pass begins with.
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            gradient, part_sums = step(hidden[part] @ weight.T, targets[part], softcap)
            sums += part_sums
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
                if gather is not None:
                    gather(gradient, hidden[part])
        return _finish(ctx, sums, hidden_grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        return _scale_hidden(ctx, grad), *([None] * 6)


class _ModuleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Any,
        targets: Tensor,
        chunk: int,
        step: SoftmaxStep,
        share: Tensor,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        hidden_grad = torch.empty_like(hidden) if wants_grad else None
        trained = [one for one in head.parameters() if one.requires_grad]
        sums = _make_sums(hidden)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wants_grad):
                taken = hidden[part].detach().requires_grad_(wants_grad)
                logits = head(taken)
                logits = logits if scale == 1.0 else logits * scale
            gradient, part_sums = step(logits.detach(), targets[part], softcap)
            sums += part_sums
            if hidden_grad is not None:
                found = torch.autograd.grad(logits, [taken, *trained], gradient)
                hidden_grad[part] = found[0]
                for parameter, summed in zip(trained, found[1:], strict=True):
                    own = summed * share.to(summed.dtype)
                    parameter.grad = own if parameter.grad is None else parameter.grad + own
        return _finish(ctx, sums, hidden_grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        return _scale_hidden(ctx, grad), *([None] * 7)


def _make_sums(hidden: Tensor) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.zeros(3, dtype=dtype, device=hidden.device)


def _finish(ctx: Any, sums: Tensor, hidden_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    if hidden_grad is not None:
        ctx.save_for_backward(hidden_grad)
    stats = sums[1:].clone()
    ctx.mark_non_differentiable(stats)
    return sums[0].clone(), stats


def _scale_hidden(ctx: Any, grad: Tensor) -> Tensor:
    (hidden_grad,) = ctx.saved_tensors
    # Late: 1 / trained tokens would have pushed fp16's small gradients out of its range.
    scaled: Tensor = (hidden_grad * grad).to(hidden_grad.dtype)
    return scaled
