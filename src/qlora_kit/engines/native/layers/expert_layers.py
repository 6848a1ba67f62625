"""Reading layers with experts as transformers and peft hold them, and running their blocks.

The router is transformers' own module, with its float32 softmax and its way of weighing choices.
Adapters of experts are peft's ``target_parameters``; their parameters stay where peft has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.experts import (
    ExpertStack,
    apply_experts,
    gather_experts,
    has_kernel,
    route,
)

__all__ = [
    "ExpertBlock",
    "ExpertCopies",
    "RouterBalance",
    "balance_experts",
    "find_block",
    "find_expert_obstacle",
    "read_balance",
    "sign_experts",
]

#: Where families' layers have their block of experts.
_BLOCKS = ("mlp", "block_sparse_moe")
_STACKS = ("gate_up_proj", "down_proj")


def find_block(layer: Any) -> Any:
    """A decoder layer's block of experts, or ``None`` where it has none."""
    blocks = (getattr(layer, name, None) for name in _BLOCKS)
    return next((block for block in blocks if getattr(block, "experts", None) is not None), None)


def find_expert_obstacle(block: Any, dtype: torch.dtype) -> str | None:
    """Why a block's experts cannot be computed here, or ``None``."""
    if getattr(block, "jitter_noise", 0.0):
        return f"router_jitter_noise={block.jitter_noise}"
    found = _unwrap(block.experts)
    if isinstance(found, str):
        return found
    experts, _ = found
    if getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False):
        return f"{type(experts).__name__} have biases or lie transposed"
    if not getattr(experts, "is_concatenated", True) or not getattr(experts, "has_gate", True):
        return f"{type(experts).__name__} have no gates side by side with what they gate"
    for name in _STACKS:
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.dtype != dtype:
            return f"{type(experts).__name__} keep {name} as something else than {dtype}"
        if weight.requires_grad:
            return f"experts' {name} is trained in full"
    return None


def sign_experts(block: Any) -> object:
    """What must be the same for an :class:`ExpertBlock` to be used again after a refresh."""
    found = _unwrap(block.experts)
    if isinstance(found, str):
        return found
    module, wrappers = found
    weights = [getattr(module, name) for name in _STACKS]
    return (
        *((weight.data_ptr(), weight._version) for weight in weights),
        *(
            (name, wrapper.lora_A[adapter].weight.data_ptr(), wrapper.scaling[adapter])
            for name, wrapper in wrappers.items()
            for adapter in _find_active(wrapper)
        ),
    )


class ExpertCopies:
    """The adapters of one stack of experts: cast once per step, gradients gathered in float32.

    Args:
        wrapper: peft's ``ParamWrapper``.
        dtype: The dtype to compute in.
        trains: Whether gradients are to be gathered.

    Attributes:
        down: LoRA A of every expert, shape ``(E, r, K)``.
        up: LoRA B of every expert, scaled, shape ``(E, N, r)``.
    """

    def __init__(self, wrapper: Any, dtype: torch.dtype, *, trains: bool = True) -> None:
        (name,) = _find_active(wrapper)
        self._down, self._up = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        self._scaling, self._experts = float(wrapper.scaling[name]), int(wrapper.num_experts)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.down = self._take_down(self._down).to(dtype, copy=True).requires_grad_(trains)
        self.up = self._take_up(self._up).to(dtype, copy=True).contiguous().requires_grad_(trains)
        sizes = (self.down.shape, self.up.shape) if trains else ((0,), (0,))
        self._down_grad, self._up_grad = (
            torch.zeros(size, dtype=wide, device=self.down.device) for size in sizes
        )
        if not trains:
            self.refresh()

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """Peft's own."""
        return self._down, self._up

    def nbytes(self) -> int:
        """Bytes of the copies and of the gathered gradients."""
        return int(
            self.down.nbytes + self.up.nbytes + self._down_grad.nbytes + self._up_grad.nbytes
        )

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients are gathered in."""
        return self._down_grad.dtype

    @property
    def gradient_count(self) -> int:
        """How many numbers the gathered gradients have."""
        return int(self._down_grad.numel() + self._up_grad.numel())

    def place_gradients(self, buffer: Tensor) -> None:
        """Gather gradients in a buffer of :attr:`gradient_count` numbers from now on."""
        down, up = buffer.split([self._down_grad.numel(), self._up_grad.numel()])
        self._down_grad = down.view(self._down_grad.shape)
        self._up_grad = up.view(self._up_grad.shape)

    def refresh(self) -> None:
        """Take the parameters' present values."""
        with torch.no_grad():
            self.down.copy_(self._take_down(self._down))
            self.up.copy_(self._take_up(self._up) * self._scaling)

    def clear_gradients(self) -> None:
        """Start a step."""
        self._down_grad.zero_()
        self._up_grad.zero_()

    def gather_gradients(self) -> None:
        """Add a micro-batch's gradients to the gathered ones."""
        if self.down.grad is not None:
            self._down_grad += self.down.grad
        if self.up.grad is not None:
            self._up_grad.add_(self.up.grad, alpha=self._scaling)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget a micro-batch's gradients."""
        self.down.grad = self.up.grad = None

    def publish_gradients(self) -> None:
        """Make the gathered gradients the parameters' own."""
        if self._down.requires_grad:
            own = self._down_grad.reshape(self._down.shape)
            self._down.grad = own.to(self._down.dtype, copy=True)
        if self._up.requires_grad:
            # peft has an output's numbers in the order (rank, expert).
            own = self._up_grad.permute(1, 2, 0).reshape(self._up.shape)
            self._up.grad = own.to(self._up.dtype)

    def _take_down(self, weight: Tensor) -> Tensor:
        return weight.detach().reshape(self._experts, -1, weight.shape[1])

    def _take_up(self, weight: Tensor) -> Tensor:
        return weight.detach().reshape(weight.shape[0], -1, self._experts).permute(2, 0, 1)


class RouterBalance(NamedTuple):
    """What a layer's router did with a micro-batch's tokens.

    Attributes:
        counts: How many choices fell to each expert, shape ``(E,)``.
        scores: The router's probabilities of each expert, added up; carries gradients.
    """

    counts: Tensor
    scores: Tensor


def balance_experts(balances: Sequence[RouterBalance], tokens: int) -> Tensor:
    """The auxiliary loss of a micro-batch as transformers' ``load_balancing_loss_func`` has it.

    Switch Transformer (Fedus et al., arXiv:2101.03961), equations 4 to 6, over all layers at once.

    Args:
        balances: One per layer with experts.
        tokens: Tokens that each of them counted.
    """
    rows = tokens * len(balances)
    counts = torch.stack([one.counts for one in balances]).sum(0) / rows
    scores = torch.stack([one.scores for one in balances]).sum(0) / rows
    return (counts * scores).sum() * len(counts)


def read_balance(config: Any) -> float:
    """What a model's loss weighs its routers' balance with, 0 for not at all."""
    wanted = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if wanted else 0.0


class ExpertBlock:
    """A layer's feed-forward block: a router, its experts, and a shared expert where there is one.

    Args:
        block: A block that :func:`find_expert_obstacle` has nothing against.
        dtype: The dtype to compute in.
        gated: A kernel for ``silu(gate) * up``, or ``None``.
        trains: As for :class:`ExpertCopies`.

    Attributes:
        copies: The adapters of its stacks.
        chosen: Experts per token.
    """

    def __init__(
        self,
        block: Any,
        dtype: torch.dtype,
        gated: Callable[[Tensor], Tensor] | None,
        *,
        trains: bool = True,
    ) -> None:
        found = _unwrap(block.experts)
        assert not isinstance(found, str)
        self._block = block
        self._module, wrappers = found
        self._router = block.gate if hasattr(block, "gate") else block.router
        # GraniteMoe's router returns the same three the other way round.
        self._is_turned = not hasattr(block, "gate")
        self._of = {
            name: ExpertCopies(wrapper, dtype, trains=trains)
            for name, wrapper in wrappers.items()
            if _find_active(wrapper)
        }
        self.copies = list(self._of.values())
        self.experts, wide, self.hidden = self._module.gate_up_proj.shape
        self.intermediate = int(wide) // 2
        # An adapter of the router's own parameter wraps it.
        self.chosen = int(getattr(self._router, "base_layer", self._router).top_k)
        is_silu = type(self._module.act_fn).__name__ in ("SiLU", "SiLUActivation")
        self._activate = gated if gated is not None and is_silu else self._module._apply_gate

    @property
    def largest_stack(self) -> int:
        """Numbers of the largest stack that is copied beside its adapters; 0 where none is."""
        return max((int(getattr(self._module, name).numel()) for name in self._of), default=0)

    def __call__(self, x: Tensor, tokens: int | None) -> tuple[Tensor, RouterBalance | None]:
        """Compute the block.

        Args:
            x: Shape ``(T, H)``.
            tokens: How many of them are no filler, to say what the router did with those; or
                ``None``, to say nothing.
        """
        logits, weights, chosen = self._route(x)
        stacks = [self._stack(name) for name in _STACKS]
        out = apply_experts(
            x, weights, route(chosen, self.experts), stacks[0], stacks[1], self._activate
        )
        out = self._add_shared(x, out)
        return out, None if tokens is None else self._measure(logits[:tokens], chosen[:tokens])

    def answer(self, x: Tensor) -> Tensor:
        """The same for a token of each of several answers, ``(B, H)``, without gradients.

        On CUDA in shapes that do not depend on what is chosen, nor waiting for it: a graph can
        capture that.
        """
        _, weights, chosen = self._route(x)
        gate_up, down = (self._stack(name) for name in _STACKS)
        if x.is_cuda and not (chosen.numel() >= self.experts and has_kernel(x, gate_up, down)):
            out = gather_experts(x, weights, chosen, gate_up, down, self._activate)
        else:
            out = apply_experts(
                x, weights, route(chosen, self.experts), gate_up, down, self._activate
            )
        return self._add_shared(x, out)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The router's logits, the weights of each token's choices, and these."""
        found = self._router(x)
        logits, weights, chosen = found[::-1] if self._is_turned else found
        return logits, weights, chosen

    def _add_shared(self, x: Tensor, out: Tensor) -> Tensor:
        shared = getattr(self._block, "shared_expert", None)
        if shared is None:
            return out
        return out + torch.sigmoid(self._block.shared_expert_gate(x)) * shared(x)

    def _measure(self, logits: Tensor, chosen: Tensor) -> RouterBalance:
        dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
        own = torch.arange(self.experts, device=chosen.device)
        counts = (chosen.reshape(-1, 1) == own).sum(0).to(dtype)
        return RouterBalance(counts, torch.softmax(logits, dim=1, dtype=dtype).sum(0))

    def _stack(self, name: str) -> ExpertStack:
        weight = getattr(self._module, name).detach()
        copies = self._of.get(name)
        if copies is None:
            return ExpertStack(weight)
        return ExpertStack(weight, copies.down, copies.up)


def _unwrap(module: Any) -> tuple[Any, dict[str, Any]] | str:
    """The experts behind peft's wrappers, and these by the parameter each adapts."""
    wrappers: dict[str, Any] = {}
    while hasattr(module, "base_layer"):
        if type(module).__name__ != "ParamWrapper":
            return f"{type(module).__name__} around experts"
        if module.merged or module.disable_adapters:
            return "disabled or merged adapters of experts"
        if len(_find_active(module)) > 1 or module.parameter_name in wrappers:
            return "several adapters of experts"
        wrappers[module.parameter_name] = module
        module = module.base_layer
    if set(wrappers) - set(_STACKS):
        return f"an adapter of experts' {', '.join(sorted(set(wrappers) - set(_STACKS)))}"
    if getattr(module, "parametrizations", None):
        return "experts whose parameters are computed from others"
    return module, wrappers


def _find_active(wrapper: Any) -> list[str]:
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]
