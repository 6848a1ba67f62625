"""A layer's experts over the tokens that a router sends to them, as one differentiable operation.

transformers holds all experts of a layer in one parameter ``(E, N, K)``. Tokens are sorted by
expert, so that one grouped product computes all of them; where there is no such kernel, one
product per expert over its rows. Nothing but the first product is kept for the backward pass.
Which expert a token goes to decides no shape but the experts' shares, so that the same tokens
give the same numbers in every run.

Mixture of experts: Shazeer et al., arXiv:1701.06538; what its layers share with others is in
:mod:`layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["ExpertStack", "Routing", "apply_experts", "gather_experts", "has_kernel", "route"]

#: Choices whose experts are copied together at once.
_GATHERED: Final = 16


class ExpertStack(NamedTuple):
    """One projection of all experts, and its adapters.

    Attributes:
        weight: Frozen, shape ``(E, N, K)``.
        down: LoRA A of every expert, shape ``(E, r, K)``, or ``None``.
        up: LoRA B of every expert, scaled, shape ``(E, N, r)``, or ``None``.
    """

    weight: Tensor
    down: Tensor | None = None
    up: Tensor | None = None


class Routing(NamedTuple):
    """Tokens sorted by expert: ``S = T * k`` rows.

    Attributes:
        owner: The token of each row, shape ``(S,)``.
        order: Where each row's token and choice lie in ``(T, k)``, shape ``(S,)``.
        places: Where each token's choices lie among the rows, shape ``(S,)``.
        ends: Where each expert's rows end, int32, shape ``(E,)``.
    """

    owner: Tensor
    order: Tensor
    places: Tensor
    ends: Tensor


def route(chosen: Tensor, experts: int) -> Routing:
    """Sort what tokens have chosen by expert.

    Args:
        chosen: Experts of each token, shape ``(T, k)``.
        experts: How many there are.
    """
    flat = chosen.reshape(-1)
    values, order = torch.sort(flat, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(values, torch.arange(experts, device=flat.device), right=True)
    return Routing(order // chosen.shape[1], order, places, ends.to(torch.int32))


def apply_experts(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    gate_up: ExpertStack,
    down: ExpertStack,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Every token's experts, weighed and added up.

    Args:
        x: Shape ``(T, H)``.
        weights: What each token's choices weigh, shape ``(T, k)``.
        routing: Of the same choices.
        gate_up: Stack of shape ``(E, 2 * I, H)``.
        down: Stack of shape ``(E, H, I)``.
        activate: From ``(S, 2 * I)`` to ``(S, I)``, differentiable.

    Returns:
        Shape ``(T, H)``. Gradients reach ``x``, ``weights`` and the adapters.
    """
    out: Tensor = _Experts.apply(
        x, weights, gate_up.down, gate_up.up, down.down, down.up,
        routing, gate_up.weight, down.weight, activate,
    )  # fmt: skip
    return out


def has_kernel(x: Tensor, gate_up: ExpertStack, down: ExpertStack) -> bool:
    """Whether :func:`apply_experts` of tokens like ``x`` waits for nothing on the device."""
    small = [one for stack in (gate_up, down) for one in stack[1:] if one is not None]
    return _has_kernel(x, gate_up.weight, down.weight, *small)


def gather_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: ExpertStack,
    down: ExpertStack,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """:func:`apply_experts` of few tokens, whose experts are copied together; no gradients.

    Args:
        x: As there, like all that follow but one.
        weights: The same.
        chosen: Experts of each token, shape ``(T, k)``.
        gate_up: The same.
        down: The same.
        activate: The same.
    """
    rows = x.repeat_interleave(chosen.shape[1], dim=0)
    parts = zip(rows.split(_GATHERED), chosen.reshape(-1).split(_GATHERED), strict=True)
    out = torch.cat([
        _multiply_gathered(activate(_multiply_gathered(part, gate_up, which)), down, which)
        for part, which in parts
    ])  # fmt: skip
    out = out * weights.reshape(-1, 1).to(out.dtype)
    return out.reshape(*chosen.shape, -1).sum(1)


def _multiply_gathered(rows: Tensor, stack: ExpertStack, which: Tensor) -> Tensor:
    """``stack[which[s]] @ rows[s]`` for every row, rounded once."""
    out = _multiply_each(stack.weight[which], rows)
    if stack.down is not None and stack.up is not None:
        low = _multiply_each(stack.down[which], rows).to(rows.dtype)
        out = out + _multiply_each(stack.up[which], low)
    return out.to(rows.dtype)


def _multiply_each(matrices: Tensor, rows: Tensor) -> Tensor:
    """``(S, N, K)`` times ``(S, K)``, ``(S, N)``; of 16 bits on CUDA in float32."""
    is_short = rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)
    kind = {"out_dtype": torch.float32} if is_short else {}
    return torch.bmm(matrices, rows[:, :, None], **kind)[:, :, 0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        first_down: Tensor | None,
        first_up: Tensor | None,
        second_down: Tensor | None,
        second_up: Tensor | None,
        routing: Routing,
        first: Tensor,
        second: Tensor,
        activate: Callable[[Tensor], Tensor],
    ) -> Tensor:
        groups = _Groups(routing.ends)
        rows = x[routing.owner]
        both, _ = _multiply(rows, ExpertStack(first, first_down, first_up), groups)
        inner = activate(both)
        out, _ = _multiply(inner, ExpertStack(second, second_down, second_up), groups)
        share = weights.reshape(-1)[routing.order].to(out.dtype)
        ctx.save_for_backward(
            x, weights, both, first, second, first_down, first_up, second_down, second_up, *routing
        )
        ctx.activate = activate
        return _add_up(out * share[:, None], routing, x.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weights, both, first, second, *rest = ctx.saved_tensors
        first_down, first_up, second_down, second_up, *places = rest
        routing = Routing(*places)
        groups = _Groups(routing.ends)
        rows = grad[routing.owner]
        share = weights.reshape(-1)[routing.order].to(rows.dtype)
        with torch.enable_grad():
            both = both.detach().requires_grad_()
            inner = ctx.activate(both)
        # y = share * W a: the gradient of `share` is <grad, W a> = <W' grad, a>, so that W a
        # needs neither to be kept nor to be computed again.
        second_stack = ExpertStack(second, second_down, second_up)
        inner_grad, low_grad = _multiply_back(rows, second_stack, groups)
        share_grad = (inner_grad * inner.detach()).sum(1, dtype=_wide(rows.dtype))
        weighed = rows * share[:, None]
        second_grads = _adapter_gradients(
            weighed, inner.detach(), low_grad, second_stack, groups, share
        )
        (both_grad,) = torch.autograd.grad(inner, both, inner_grad * share[:, None])
        del both, inner, inner_grad, weighed
        first_stack = ExpertStack(first, first_down, first_up)
        rows_grad, low_grad = _multiply_back(both_grad, first_stack, groups)
        first_grads = _adapter_gradients(
            both_grad, x[routing.owner], low_grad, first_stack, groups, None
        )
        x_grad = _add_up(rows_grad, routing, x.shape[0])
        weights_grad = share_grad[routing.places].reshape(weights.shape).to(weights.dtype)
        return x_grad, weights_grad, *first_grads, *second_grads, None, None, None, None


class _Groups:
    """Where experts' rows end, on the device for kernels and on the host for loops."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends
        self._bounds: list[int] | None = None

    @property
    def bounds(self) -> list[int]:
        """Read once, as it waits for the device."""
        if self._bounds is None:
            self._bounds = [0, *self.ends.tolist()]
        return self._bounds

    def spans(self) -> list[tuple[int, slice]]:
        """Experts with rows, and these."""
        bounds = self.bounds
        return [
            (index, slice(start, end))
            for index, (start, end) in enumerate(pairwise(bounds))
            if end > start
        ]


def _multiply(rows: Tensor, stack: ExpertStack, groups: _Groups) -> tuple[Tensor, Tensor | None]:
    """``rows @ W.T + (rows @ down.T) @ up.T`` by expert, ``(S, N)``, and the small product."""
    weight, down, up = stack
    if down is None or up is None:
        return _group_product(rows, weight.mT, groups), None
    low = _group_product(rows, down.mT, groups)
    return _sum_products(rows, weight.mT, low, up.mT, groups), low


def _multiply_back(
    grad: Tensor, stack: ExpertStack, groups: _Groups
) -> tuple[Tensor, Tensor | None]:
    """The transposed product ``(S, N) -> (S, K)``."""
    weight, down, up = stack
    if down is None or up is None:
        return _group_product(grad, weight, groups), None
    low = _group_product(grad, up, groups)
    return _sum_products(grad, weight, low, down, groups), low


def _sum_products(
    rows: Tensor, stack: Tensor, low: Tensor, small: Tensor, groups: _Groups
) -> Tensor:
    """Both products rounded once; see :func:`projection.project` for why."""
    if _has_kernel(rows, stack, small):
        wide = torch.cat((rows, low), dim=1)
        joined = torch.cat((stack, small), dim=1)
        return torch.nn.functional.grouped_mm(wide, joined, offs=groups.ends)
    out = rows.new_empty((rows.shape[0], stack.shape[2]))
    for index, span in groups.spans():
        if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):
            # cuBLAS rounds what it adds to before it adds.
            total = torch.mm(low[span], small[index], out_dtype=torch.float32)
            out[span] = torch.addmm(total, rows[span], stack[index], out_dtype=torch.float32)
        else:
            out[span] = (low[span] @ small[index]).addmm_(rows[span], stack[index])
    return out


def _adapter_gradients(
    grad: Tensor,
    rows: Tensor,
    low_grad: Tensor | None,
    stack: ExpertStack,
    groups: _Groups,
    share: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a stack's ``down`` and ``up``.

    Args:
        grad: Of the product, weighed, shape ``(S, N)``.
        rows: What went in, shape ``(S, K)``.
        low_grad: The unweighed ``grad @ up``, shape ``(S, r)``.
        stack: The weights.
        groups: Whose rows these are.
        share: What ``low_grad`` is still to be weighed with, or ``None``.
    """
    if low_grad is None or stack.down is None or stack.up is None:
        return None, None
    if share is not None:
        low_grad = low_grad * share[:, None]
    low = _group_product(rows, stack.down.mT, groups)
    return (
        _group_outer(low_grad, rows, groups, stack.down),
        _group_outer(grad, low, groups, stack.up),
    )


def _group_product(rows: Tensor, stack: Tensor, groups: _Groups) -> Tensor:
    """``rows[of e] @ stack[e]`` for every expert: ``(S, K), (E, K, N) -> (S, N)``."""
    if _has_kernel(rows, stack):
        return torch.nn.functional.grouped_mm(rows, stack, offs=groups.ends)
    out = rows.new_empty((rows.shape[0], stack.shape[2]))
    for index, span in groups.spans():
        torch.mm(rows[span], stack[index], out=out[span])
    return out


def _group_outer(left: Tensor, right: Tensor, groups: _Groups, like: Tensor) -> Tensor:
    """``left[of e].T @ right[of e]``: ``(S, M), (S, N) -> (E, M, N)``."""
    if _has_kernel(left, like, right):
        found = torch.nn.functional.grouped_mm(left.T, right, offs=groups.ends)
        # Of an expert without rows the kernel need not write anything.
        starts = torch.cat((groups.ends.new_zeros(1), groups.ends[:-1]))
        return torch.where((groups.ends > starts)[:, None, None], found, 0)
    out = torch.zeros_like(like)
    for index, span in groups.spans():
        out[index] = left[span].T @ right[span]
    return out


def _has_kernel(rows: Tensor, *others: Tensor) -> bool:
    """Whether one kernel computes all experts: bfloat16 on CUDA, rows of whole 16 bytes."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and all(size % 8 == 0 for one in (rows, *others) for size in one.shape[1:])
    )


def _add_up(rows: Tensor, routing: Routing, tokens: int) -> Tensor:
    """Every token's rows added up, ``(S, H) -> (T, H)``, in the order of its choices."""
    return rows[routing.places].reshape(tokens, -1, rows.shape[1]).sum(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
