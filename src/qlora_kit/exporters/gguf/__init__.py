"""GGUF: what llama.cpp and Ollama run. Registers ``gguf`` and ``gguf-lora``."""

from __future__ import annotations

from qlora_kit.exporters.gguf.exporter import GgufExporter
from qlora_kit.exporters.gguf.lora import GgufLoraExporter
from qlora_kit.hookspecs import Exporter, hookimpl

__all__ = ["GgufExporter", "GgufLoraExporter"]


@hookimpl
def qlora_kit_register_exporters() -> list[Exporter]:
    """Register both formats."""
    return [GgufExporter(), GgufLoraExporter()]
