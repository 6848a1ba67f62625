"""``merged_16bit``: the adapter merged in, a plain Hugging Face checkpoint in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.artifacts.config_files import (
    make_config,
    write_config,
    write_generation_config,
)
from qlora_kit.artifacts.model_card import write_merged_card
from qlora_kit.artifacts.safetensors_writer import count_bytes, parse_size, write_tensors
from qlora_kit.artifacts.tokenizer_files import write_tokenizer
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest, hookimpl
from qlora_kit.results import Verification
from qlora_kit.verification.checkpoint import verify_merged
from qlora_kit.weights.merge_base import (
    MergeBase,
    choose_merge_base,
    choose_merge_dtype,
    describe_merge_base,
)
from qlora_kit.weights.merged import MergedWeights
from qlora_kit.weights.shared_merge import SharedMerge

if TYPE_CHECKING:
    import torch

__all__ = ["Merged16bit", "Merged16bitOptions"]


@dataclass(frozen=True)
class Merged16bitOptions:
    """Options of ``merged_16bit``.

    Attributes:
        base: What a quantized base is merged into: ``"original"``, the 16-bit checkpoint it was
            quantized from; ``"dequantized"``, exactly the weights the adapter was trained on; or
            ``"auto"``: dequantized, which is the model that was trained.
        dtype: ``"auto"`` takes the base checkpoint's own 16-bit dtype, else bfloat16.
        max_shard_size: Bytes per file, such as ``"5GB"``.
    """

    base: Literal["auto", "original", "dequantized"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)


class Merged16bit:
    """Writes merged weights, configuration, generation settings and tokenizer."""

    name = "merged_16bit"
    summary = "Adapter merged into the base, a 16-bit safetensors checkpoint for any tool."
    options_type = Merged16bitOptions
    #: Other formats of one call can read its tensors back.
    shares_merge = True

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse what cannot be merged and count the bytes."""
        base, dtype = _settle(request)
        with MergedWeights(request.model, base, dtype=dtype) as merged:
            merged.config_updates()
            size = sum(count_bytes(merged, name) for name in merged.names())
        return ExportEstimate(size, (describe_merge_base(request.model, base),))

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Stream every tensor into shards."""
        base, dtype = _settle(request)
        name = str(dtype).removeprefix("torch.")
        shared = request.shared or SharedMerge()
        with shared.open(request.model, base, dtype) as merged:
            written = write_tensors(
                merged,
                folder,
                max_shard_size=parse_size(request.options.max_shard_size),
                progress=request.progress,
            )
            config = make_config(request.model, dtype=name, updates=merged.config_updates())
            write_config(request.model, folder, config)
            adapted = len(merged.adapted_names())
        write_generation_config(request.model, folder)
        write_tokenizer(request.model, folder)
        write_merged_card(request.model, folder, self.name)
        if request.destination is not None:
            shared.offer(base, dtype, request.destination)
        return {
            "base": base,
            "dtype": name,
            "adapted_tensors": adapted,
            "tensor_bytes": written.total_size,
            "sha256": written.sha256,
        }

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Compare tensors with a second computation, and a reload with the live model."""
        base, dtype = _settle(request)
        with MergedWeights(request.model, base, dtype=dtype) as merged:
            return verify_merged(request.model, folder, merged, request.verify)


def _settle(request: ExportRequest) -> tuple[MergeBase, torch.dtype]:
    """The base and dtype that the options amount to for this model."""
    return (
        choose_merge_base(request.model, request.options.base),
        choose_merge_dtype(request.model, request.options.dtype),
    )


@hookimpl
def qlora_kit_register_exporters() -> list[Exporter]:
    """Register this format."""
    return [Merged16bit()]
