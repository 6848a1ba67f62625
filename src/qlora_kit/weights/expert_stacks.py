"""Experts that transformers holds in one tensor, and their checkpoint in one tensor each.

An adapter of a parameter (peft's ``target_parameters``) changes the whole stack; what is written
are the tensors that other tools read, under the names in the base's files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.weights.live import LiveTensor

if TYPE_CHECKING:
    import torch

__all__ = ["ExpertStacks", "add_stack_update"]

#: Stacks that stay split: a layer's two, of which files name experts in turn.
_KEPT: Final = 2


class ExpertStacks:
    """Stacked tensors of a model, taken apart as its checkpoint has them.

    Args:
        hf_model: The transformers model, which knows how its tensors were put together.
    """

    def __init__(self, hf_model: Any) -> None:
        self._model = hf_model
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stacks: dict[str, LiveTensor] = {}
        self._split: OrderedDict[tuple[str, str], Mapping[str, torch.Tensor]] = OrderedDict()

    def add(self, live: LiveTensor) -> list[str]:
        """Names that a stack has in a checkpoint; of nothing but its shape."""
        import torch

        pieces = self._take_apart(live.name, torch.empty(live.shape, device="meta"))
        self._shapes |= {name: tuple(piece.shape) for name, piece in pieces.items()}
        self._stacks |= dict.fromkeys(pieces, live)
        return list(pieces)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """A piece's shape."""
        return self._shapes[name]

    def load(self, name: str, kind: str, make: Callable[[LiveTensor], torch.Tensor]) -> Any:
        """One piece of a stack.

        Args:
            name: The piece.
            kind: What ``make`` makes; the stack of one kind is made once for all its pieces.
            make: Makes the whole stack.
        """
        live = self._stacks[name]
        key = (live.name, kind)
        if key not in self._split:
            self._split[key] = self._take_apart(live.name, make(live))
            while sum(known == kind for _, known in self._split) > _KEPT:
                oldest = next(entry for entry in self._split if entry[1] == kind)
                del self._split[oldest]
        return self._split[key][name]

    def _take_apart(self, name: str, stack: torch.Tensor) -> Mapping[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        pieces: Mapping[str, torch.Tensor] = revert_weight_conversion(self._model, {name: stack})
        return pieces


def add_stack_update(weight: torch.Tensor, layer: Any, adapter: str) -> None:
    """Add an adapter's update to a parameter, in place, as peft's ``ParamWrapper`` defines it.

    Args:
        weight: The parameter in float32: (out, in), or a stack of experts (E, out, in) or
            (E, in, out).
        layer: peft's wrapper.
        adapter: The adapter's name.
    """
    import torch

    a = layer.lora_A[adapter].weight.detach().to(weight)
    b = layer.lora_B[adapter].weight.detach().to(weight)
    if weight.dim() == 2:
        weight.addmm_(b, a, alpha=layer.scaling[adapter])
        return
    experts = weight.shape[0]
    a = a.reshape(experts, -1, a.shape[-1])  # (E, r, in)
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
    if layer._did_swap_in_out_features:
        weight.add_(torch.bmm(b, a), alpha=layer.scaling[adapter])
    else:
        weight.add_(torch.bmm(b, a).transpose(1, 2), alpha=layer.scaling[adapter])
