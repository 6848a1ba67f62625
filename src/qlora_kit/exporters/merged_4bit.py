"""``merged_4bit``: the adapter merged in, a bitsandbytes NF4 checkpoint that loads as it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_kit.artifacts.config_files import (
    make_config,
    write_config,
    write_generation_config,
)
from qlora_kit.artifacts.model_card import write_merged_card
from qlora_kit.artifacts.safetensors_writer import count_bytes, parse_size, write_tensors
from qlora_kit.artifacts.tokenizer_files import write_tokenizer
from qlora_kit.errors import MissingDependencyError
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest, hookimpl
from qlora_kit.results import Verification
from qlora_kit.verification.checkpoint import verify_quantized
from qlora_kit.weights.live import get_hf_model
from qlora_kit.weights.merge_base import (
    choose_merge_base,
    choose_merge_dtype,
    describe_merge_base,
    warn_of_coarse_rounding,
)
from qlora_kit.weights.merged import MergedWeights
from qlora_kit.weights.nf4 import LinearLayers, Nf4Weights, find_linears
from qlora_kit.weights.shared_merge import SharedMerge

__all__ = ["Merged4bit", "Merged4bitOptions"]


@dataclass(frozen=True)
class Merged4bitOptions:
    """Options of ``merged_4bit``.

    Attributes:
        base: What a quantized base is merged into before it is quantized again, as for
            ``merged_16bit``; but ``"auto"`` is the original of a 4-bit base, unless none exists or
            LoftQ started the adapter. Dequantized weights sit on the 4-bit grid and swallow small
            updates when they are rounded to it again.
        dtype: What norms, embeddings and the head are kept in, and what the 4-bit layers
            compute in. ``"auto"`` takes the base checkpoint's own 16-bit dtype, else bfloat16.
        use_double_quant: Keep the scales in 8 bits as well, which saves 0.4 bits per weight.
        max_shard_size: Bytes per file, such as ``"5GB"``.
    """

    base: Literal["auto", "original", "dequantized"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    use_double_quant: bool = True
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)


class Merged4bit:
    """Writes quantized weights, configuration, generation settings and tokenizer."""

    name = "merged_4bit"
    summary = "Adapter merged in and quantized to NF4, which transformers loads as it is."
    options_type = Merged4bitOptions

    def find_missing(self) -> list[str]:
        """Whether bitsandbytes is there; without importing it, which imports torch."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return ["the package bitsandbytes"]
        return []

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse what cannot be merged or quantized, and count the bytes."""
        try:
            import bitsandbytes  # noqa: F401
        # A build without kernels for this machine raises whatever the system does.
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingDependencyError(
                f"Format 'merged_4bit' needs the package bitsandbytes ({error}). Install it with: "
                "pip install bitsandbytes"
            ) from error
        with _open_again(request) as (quantized, _):
            size = sum(count_bytes(quantized, name) for name in quantized.names())
            base = quantized.merged.base
        warn_of_coarse_rounding(
            request.model,
            base,
            "merged_4bit",
            "Compare the result's facts['kl'], or use format 'merged_16bit'.",
        )
        return ExportEstimate(size, (describe_merge_base(request.model, base),))

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Merge, quantize and write, one tensor at a time."""
        model, options = request.model, request.options
        base = choose_merge_base(model, options.base, to_4bit=True)
        dtype = choose_merge_dtype(model, options.dtype)
        shared = request.shared or SharedMerge()
        with shared.open(model, base, dtype) as merged:
            layers, config = _plan(request, merged)
            written = write_tensors(
                _quantize(request, merged, layers),
                folder,
                max_shard_size=parse_size(options.max_shard_size),
                progress=request.progress,
            )
            write_config(model, folder, config)
            adapted = len(merged.adapted_names())
        write_generation_config(model, folder)
        write_tokenizer(model, folder)
        write_merged_card(model, folder, self.name)
        return {
            "base": base,
            "dtype": str(dtype).removeprefix("torch."),
            "adapted_tensors": adapted,
            "quantized_tensors": len(layers.is_transposed),
            "tensor_bytes": written.total_size,
            "sha256": written.sha256,
        }

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Compare tensors with a second computation, and a reload with the live model."""
        with _open_again(request) as (quantized, config):
            return verify_quantized(request.model, folder, quantized, config, request.verify)


def _plan(request: ExportRequest, merged: Any) -> tuple[LinearLayers, Any]:
    """The layers to quantize, and the configuration that says so."""
    from transformers import BitsAndBytesConfig

    model, dtype = request.model, merged.dtype
    name = str(dtype).removeprefix("torch.")
    updates = merged.config_updates()
    layers = find_linears(
        make_config(model, dtype=name, updates=updates),
        trust_remote_code=model.config.trust_remote_code,
    )
    stated = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.options.use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        # Said outright, because the default may change and other loaders have their own.
        llm_int8_skip_modules=list(layers.skipped),
    ).to_dict()
    return layers, make_config(model, dtype=name, updates=updates, quantization=stated)


def _quantize(request: ExportRequest, merged: Any, layers: LinearLayers) -> Nf4Weights:
    device = next(p.device for p in get_hf_model(request.model.model).parameters())
    return Nf4Weights(
        merged, layers, use_double_quant=request.options.use_double_quant, device=device
    )


@contextmanager
def _open_again(request: ExportRequest) -> Iterator[tuple[Nf4Weights, Any]]:
    """Tensors from the live model, whatever other exports have written, and configuration."""
    base = choose_merge_base(request.model, request.options.base, to_4bit=True)
    dtype = choose_merge_dtype(request.model, request.options.dtype)
    with MergedWeights(request.model, base, dtype=dtype) as merged:
        layers, config = _plan(request, merged)
        yield _quantize(request, merged, layers), config


@hookimpl
def qlora_kit_register_exporters() -> list[Exporter]:
    """Register this format."""
    return [Merged4bit()]
