"""The export format ``ctranslate2`` for qlora_kit."""

from __future__ import annotations

import qlora_kit
from qlora_kit_ctranslate2.exporter import CTranslate2Exporter, CTranslate2Options

__all__ = ["CTranslate2Exporter", "CTranslate2Options"]


@qlora_kit.hookimpl
def qlora_kit_register_exporters() -> list[qlora_kit.Exporter]:
    """Register the format; called once, when somebody first asks for a format."""
    return [CTranslate2Exporter()]
