"""bitsandbytes as the engines use it: what to load with, and whether it runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from qlora_kit.config import LoadConfig
from qlora_kit.device import to_torch_dtype
from qlora_kit.errors import MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

__all__ = [
    "QuantizationName",
    "check_bitsandbytes",
    "make_quantization_config",
    "read_stored_quantization",
    "set_compute_dtype",
]

QuantizationName = Literal["nf4", "fp4", "int8"]


def read_stored_quantization(folder: Path) -> QuantizationName | None:
    """How the files in a folder are quantized already, from ``config.json``.

    Raises:
        UnsupportedModelError: When they are quantized by something other than bitsandbytes.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is damaged: its quantization_config is {stored!r}. Download "
            "it again."
        )
    method = stored.get("quant_method") or ("bitsandbytes" if stored.get("load_in_4bit") else None)
    if method != "bitsandbytes":
        raise UnsupportedModelError(
            f"{folder} is quantized with {method!r}; adapters can be trained on bitsandbytes or "
            "unquantized checkpoints. Start from the model's 16-bit checkpoint."
        )
    if stored.get("load_in_8bit") or stored.get("_load_in_8bit"):
        return "int8"
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is damaged: its bnb_4bit_quant_type is {kind!r}. Download "
            "it again."
        )
    return cast("QuantizationName", kind)


def make_quantization_config(config: LoadConfig, dtype: str) -> BitsAndBytesConfig | None:
    """NF4 with double quantization, int8, or nothing, as asked for."""
    from transformers import BitsAndBytesConfig

    if config.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=to_torch_dtype(dtype),
        )
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def check_bitsandbytes(device: torch.device, quantization: QuantizationName) -> None:
    """Quantize a few numbers on the device, so that failure comes before any weight is read.

    Raises:
        MissingDependencyError: When bitsandbytes is not installed or does not run there.
    """
    import torch

    advice = "Load with load_in_4bit=False for 16-bit weights, which need no bitsandbytes."
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise MissingDependencyError(
            f"{quantization} weights need the bitsandbytes package, which cannot be imported "
            f"({error}). {advice}"
        ) from error
    try:
        probe = torch.linspace(-1, 1, 256, device=device).reshape(4, 64)
        if quantization == "int8":
            bnb.int8_vectorwise_quant(probe.to(torch.float16))
        else:
            packed, state = bnb.quantize_4bit(probe, quant_type=quantization)
            bnb.dequantize_4bit(packed, state)
    # bitsandbytes raises whatever its backend raises: RuntimeError, NotImplementedError, OSError.
    except (RuntimeError, NotImplementedError, OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"bitsandbytes is installed but cannot quantize to {quantization} on "
            f"{device.type}: {error}. {advice}"
        ) from error


def set_compute_dtype(model: Any, dtype: torch.dtype) -> None:
    """Make a model of a quantized checkpoint compute in ``dtype`` instead of what its file says.

    transformers 5.24 converts the biases of such a checkpoint and leaves norms and embeddings as
    they are stored, so that a LayerNorm holds two dtypes and fails.
    """
    from bitsandbytes.nn import Linear4bit

    kept = {
        name
        for kind in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, kind, None) or ()
    }
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
