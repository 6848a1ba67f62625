"""``lora``: the adapter alone, as peft reads it, with tokenizer, template and model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.artifacts.config_files import write_generation_config
from qlora_kit.artifacts.model_card import find_base_name, write_adapter_card
from qlora_kit.artifacts.safetensors_writer import count_bytes, write_tensors
from qlora_kit.artifacts.tokenizer_files import write_tokenizer
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest, hookimpl
from qlora_kit.results import Verification
from qlora_kit.verification.checkpoint import verify_adapter
from qlora_kit.weights.adapter import AdapterTensors
from qlora_kit.weights.merge_base import check_base_files

__all__ = ["Lora", "LoraOptions"]


@dataclass(frozen=True)
class LoraOptions:
    """Options of ``lora``: none."""


class Lora:
    """Writes the active adapter for ``PeftModel.from_pretrained``."""

    name = "lora"
    summary = "The adapter alone, for peft; small, and needs the base model beside it."
    options_type = LoraOptions

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse a model without an adapter."""
        tensors = AdapterTensors(request.model)
        if request.verify:
            check_base_files(request.model)
        return ExportEstimate(sum(count_bytes(tensors, name) for name in tensors.names()))

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Write adapter tensors and configuration, then the files around them."""
        model = request.model
        tensors = AdapterTensors(model)
        written = write_tensors(
            tensors,
            folder,
            max_shard_size=2**62,
            progress=request.progress,
            stem="adapter_model",
        )
        _write_adapter_config(model, tensors, folder)
        write_generation_config(model, folder)
        write_tokenizer(model, folder)
        write_adapter_card(model, folder, find_base_name(model))
        return {
            "adapter": tensors.adapter,
            "tensors": len(tensors.names()),
            "tensor_bytes": written.total_size,
            "sha256": written.sha256,
        }

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Compare every tensor, and a reload with the live model."""
        tensors = AdapterTensors(request.model)
        return verify_adapter(request.model, folder, tensors, request.verify)


def _write_adapter_config(model: LoadedModel, tensors: AdapterTensors, folder: Path) -> None:
    config = copy.deepcopy(tensors.config)
    config.inference_mode = True
    config.base_model_name_or_path = find_base_name(model)
    for name, value in tensors.config_updates().items():
        setattr(config, name, value)
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


@hookimpl
def qlora_kit_register_exporters() -> list[Exporter]:
    """Register this format."""
    return [Lora()]
