"""Reading peft's and bitsandbytes' layers: what they hold, and whether it can be fused.

Nothing is changed here. Weights are referred to where they lie; only block maxima are
dequantized (4 bytes per 64 weights), so that reading them costs no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AdapterPart",
    "GroupReader",
    "find_weight_obstacle",
    "read_adapter",
    "read_group",
]


@dataclass(frozen=True)
class AdapterPart:
    """One projection's adapter: ``scaling * up @ down`` is added to its weight.

    Attributes:
        down: peft's ``lora_A`` weight, shape ``(r, K)``.
        up: peft's ``lora_B`` weight, shape ``(N, r)``.
        scaling: The factor.
        dropout: How much of its input it goes without in training.
    """

    down: Tensor
    up: Tensor
    scaling: float
    dropout: float = 0.0


@dataclass(frozen=True)
class GroupReader:
    """A group of projections that can be fused.

    Attributes:
        weights: Packed weights, or 16/32-bit matrices when ``scales`` is empty.
        scales: Dequantized block maxima, float32.
        rows: Output features per projection.
        columns: Input features.
        blocksize: Weights per block maximum.
        quant_type: ``"nf4"`` or ``"fp4"``; empty for unquantized weights.
        bias: All biases one after the other, or ``None``.
        adapters: One per projection; ``None`` where there is no adapter.
    """

    weights: list[Tensor]
    scales: list[Tensor]
    rows: list[int]
    columns: int
    blocksize: int
    quant_type: str
    bias: Tensor | None
    adapters: tuple[AdapterPart | None, ...]

    @property
    def dropouts(self) -> tuple[tuple[int, float], ...] | None:
        """Rank and probability of each adapter, where one drops anything."""
        parts = [part for part in self.adapters if part is not None]
        if not any(part.dropout for part in parts):
            return None
        return tuple((int(part.down.shape[0]), part.dropout) for part in parts)


@dataclass(frozen=True)
class _Frozen:
    weight: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    blocksize: int
    quant_type: str


def read_group(
    modules: Sequence[Any], dtype: torch.dtype, *, trains: bool = True
) -> GroupReader | str:
    """What a group of projections holds.

    Args:
        modules: peft or plain linear modules that read the same input.
        dtype: The dtype the layer computes in.
        trains: As in :func:`read_adapter`.

    Returns:
        The group, or why it cannot be fused.
    """
    frozen, adapters, biases = [], [], []
    for module in modules:
        adapter = read_adapter(module, trains=trains)
        if isinstance(adapter, str):
            return adapter
        base = module.base_layer if hasattr(module, "base_layer") else module
        weight = _read_weight(base, dtype)
        if isinstance(weight, str):
            return weight
        if base.bias is not None and base.bias.requires_grad:
            return "a trained bias"
        frozen.append(weight)
        adapters.append(adapter)
        biases.append(base.bias)
    first = frozen[0]
    if any((w.blocksize, w.quant_type) != (first.blocksize, first.quant_type) for w in frozen):
        return "projections quantized in different ways"
    rows = [w.shape[0] for w in frozen]
    bias = None
    if any(b is not None for b in biases):
        parts = [
            torch.zeros(row, dtype=dtype, device=first.weight.device) if b is None else b.to(dtype)
            for b, row in zip(biases, rows, strict=True)
        ]
        bias = torch.cat(parts).detach()
    return GroupReader(
        weights=[w.weight for w in frozen],
        scales=[w.scale for w in frozen if w.scale is not None],
        rows=rows,
        columns=first.shape[1],
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        bias=bias,
        adapters=tuple(adapters),
    )


def find_weight_obstacle(base: Any, dtype: torch.dtype) -> str | None:
    """Why a frozen linear module's weight cannot be read, or ``None``.

    Args:
        base: The module that an adapter wraps.
        dtype: The dtype to compute in.
    """
    weight = getattr(base, "weight", None)
    if weight is None or weight.requires_grad:
        return "a trained base weight"
    if type(base) is torch.nn.Linear:
        return None if weight.dtype == dtype else f"{weight.dtype} weights in a {dtype} model"
    state = getattr(weight, "quant_state", None)
    if state is None or type(base).__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return f"{type(base).__name__} layers"
    if getattr(state, "packing_format_for_cpu", False):
        return "weights repacked by bitsandbytes for CPU inference"
    if tuple(state.shape) != (base.out_features, base.in_features):
        return "weights quantized in transposed order"
    if base.compute_dtype not in (None, dtype):
        return f"4-bit layers computing in {base.compute_dtype} in a {dtype} model"
    return None


def _read_weight(base: Any, dtype: torch.dtype) -> _Frozen | str:
    obstacle = find_weight_obstacle(base, dtype)
    if obstacle is not None:
        return obstacle
    weight = base.weight
    if type(base) is torch.nn.Linear:
        return _Frozen(weight.detach(), None, (weight.shape[0], weight.shape[1]), 0, "")
    state = weight.quant_state
    scale = state.absmax
    if state.nested:
        second = state.state2
        scale = torch.ops.bitsandbytes.dequantize_blockwise(
            scale, second.absmax, second.code, second.blocksize, torch.float32
        )
        scale = scale + state.offset
    # A plain tensor: Params4bit runs Python on every operation.
    packed = weight.detach().as_subclass(Tensor).view(-1, 1)
    return _Frozen(
        packed, scale.float(), (state.shape[0], state.shape[1]), state.blocksize, state.quant_type
    )


def read_adapter(module: Any, *, trains: bool = True) -> AdapterPart | str | None:
    """A module's one active adapter, why it cannot be fused, or ``None`` where there is none.

    Args:
        module: A peft or plain module.
        trains: Whether gradients are wanted. Otherwise a disabled adapter is none.
    """
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A"):
        return f"{type(module).__name__} wrappers"
    if module.merged or (trains and module.disable_adapters):
        return "disabled or merged adapters"
    if module.disable_adapters:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        return "several active adapters"
    (name,) = active
    if name in module.lora_variant:
        return f"{type(module.lora_variant[name]).__name__}"
    dropout = float(getattr(module.lora_dropout[name], "p", 0.0))
    if module.lora_bias.get(name) or getattr(module, "fan_in_fan_out", False):
        return "adapter biases or transposed weights"
    down, up = module.lora_A[name], module.lora_B[name]
    if type(down) is not torch.nn.Linear or type(up) is not torch.nn.Linear:
        return f"{type(down).__name__} adapters"
    return AdapterPart(down.weight, up.weight, float(module.scaling[name]), dropout)
