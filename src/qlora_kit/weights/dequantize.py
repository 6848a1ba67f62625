"""Reading bitsandbytes weights back as floating-point numbers, without changing them.

peft's helper moves 8-bit weights between devices and re-creates parameters on the way; an
export must leave the live model exactly as it was.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["dequantize"]


def dequantize(module: Any, key: str = "weight") -> torch.Tensor:
    """The weight a bitsandbytes layer computes with.

    Args:
        module: A ``Linear4bit`` or ``Linear8bitLt``.
        key: The parameter's name.

    Returns:
        A new tensor on the weight's device: in the dtype the 4-bit weight was quantized from,
        or float32 for 8 bits.

    Raises:
        UnsupportedModelError: When the weight is neither.
    """
    weight = getattr(module, key)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _dequantize_4bit(weight)
    if kind == "Int8Params":
        return _dequantize_8bit(weight, module)
    raise UnsupportedModelError(f"A weight of kind {kind} cannot be dequantized.")


def _dequantize_4bit(weight: Any) -> torch.Tensor:
    from bitsandbytes import functional

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # The inverse writes into the state it is given; the live one stays packed.
        unpack: Any = functional._convert_weight_packed_for_cpu_inverse
        data, state = unpack(data, copy.copy(state))
    return functional.dequantize_4bit(data, state)


def _dequantize_8bit(weight: Any, module: Any) -> torch.Tensor:
    import torch

    # bitsandbytes moves the scales from the parameter to the layer's state at the first forward.
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    if scales is None:
        raise UnsupportedModelError(
            "An 8-bit weight has no scales, so its values are unknown. Load the model again."
        )
    result: torch.Tensor = weight.data.to(torch.float32)
    return result.mul_(scales.to(result.device, torch.float32).view(-1, 1) / 127.0)
