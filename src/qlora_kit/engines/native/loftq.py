"""LoftQ on a base that is already in 4 bits.

The adapter starts as the best low-rank approximation of what quantization took away, so
that base and adapter together begin near the original weights (Li et al., "LoftQ",
arXiv:2310.08659, algorithm 1 with one alternating step: the quantized weights stay as they
are). peft's own version needs a GPU, an unquantized base in memory, and forgets the
adapter's scaling.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qlora_kit.config import AdapterConfig
from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.handles import BaseInfo
from qlora_kit.messages import Setting
from qlora_kit.weights.source import SafetensorsSource

__all__ = ["check", "initialize", "is_requested"]

logger = logging.getLogger(__name__)

# Power iterations of the randomized SVD; 4 brings it within rounding of the exact one here.
_POWER_ITERATIONS = 4


def is_requested(config: AdapterConfig) -> bool:
    """Whether the user asked for LoftQ, by either of peft's two parameters."""
    return config.init_lora_weights == "loftq" or bool(config.loftq_config)


def check(base: BaseInfo, config: AdapterConfig) -> None:
    """Refuse what LoftQ cannot start from.

    Raises:
        ConfigError: When the base is not in 4 bits, or has no 16-bit original to compare with.
    """
    options = dict(config.loftq_config or {})
    if base.quantization not in ("nf4", "fp4"):
        raise ConfigError(
            "LoftQ makes up for 4-bit rounding, and this base is "
            f"{base.quantization or 'not quantized'}.",
            advice=(
                "Load with ",
                Setting("load_in_4bit", True, "load_quantized"),
                ", or drop loftq_config.",
            ),
        )
    if base.is_prequantized:
        raise ConfigError(
            f"LoftQ needs the 16-bit weights, and {base.path} holds only {base.quantization} "
            "ones. Load the original checkpoint."
        )
    unknown = set(options) - {"loftq_bits", "loftq_iter"}
    if unknown or options.get("loftq_bits", 4) != 4 or options.get("loftq_iter", 1) != 1:
        raise ConfigError(
            Setting("loftq_config", options, "attach_lora"),
            ": on a 4-bit base only loftq_bits=4 and loftq_iter=1 are possible. More "
            "iterations would requantize the base, and the saved adapter would no longer fit "
            "the base it is loaded on.",
            parameter="loftq_config",
            value=options,
        )


def initialize(model: Any, base_folder: Path) -> None:
    """Set every 4-bit layer's A and B from the quantization residual.

    Args:
        model: A ``PeftModel`` over a 4-bit base.
        base_folder: The 16-bit checkpoint the base was quantized from.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    with SafetensorsSource(base_folder) as source, torch.no_grad():
        known = set(source.names())
        for name, module in model.get_base_model().named_modules():
            if not isinstance(module, Linear4bit):
                continue
            tensor_name = f"{name}.weight"
            if tensor_name not in known:
                raise UnsupportedModelError(
                    f"LoftQ: {base_folder} stores no tensor {tensor_name!r}."
                )
            weight = module.get_base_layer().weight
            original = source.load(tensor_name).to(weight.device, torch.float32)
            residual = original - dequantize_4bit(weight.data, weight.quant_state).float()
            for adapter in module.lora_A:
                rank = module.r[adapter]
                u, s, v = torch.svd_lowrank(
                    residual, q=min(rank + 8, *residual.shape), niter=_POWER_ITERATIONS
                )
                root = (s[:rank] / module.scaling[adapter]).sqrt()
                b, a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
                b.data = (u[:, :rank] * root).to(b.dtype).contiguous()
                a.data = (root[:, None] * v[:, :rank].T).to(a.dtype).contiguous()
    logger.info("LoftQ: adapters start at the quantization residual.")
