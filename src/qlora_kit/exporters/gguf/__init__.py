"""GGUF: what llama.cpp and Ollama run. Registers ``gguf`` and ``gguf-lora``.

Other packages add model families here, see :func:`register_family`.
"""

from __future__ import annotations

from qlora_kit.exporters.gguf.families.family import Config, Description, Family
from qlora_kit.exporters.gguf.families.table import FAMILIES, register_family
from qlora_kit.exporters.gguf.lora_exporter import GgufLoraExporter, GgufLoraOptions
from qlora_kit.exporters.gguf.model_exporter import GgufExporter, GgufOptions
from qlora_kit.exporters.gguf.tokenizer.pre_tokenizers import PreTokenizer, register_pre_tokenizer
from qlora_kit.hookspecs import Exporter, hookimpl

__all__ = [
    "FAMILIES",
    "Config",
    "Description",
    "Family",
    "GgufExporter",
    "GgufLoraExporter",
    "GgufLoraOptions",
    "GgufOptions",
    "PreTokenizer",
    "register_family",
    "register_pre_tokenizer",
]


@hookimpl
def qlora_kit_register_exporters() -> list[Exporter]:
    """Register both formats."""
    return [GgufExporter(), GgufLoraExporter()]
