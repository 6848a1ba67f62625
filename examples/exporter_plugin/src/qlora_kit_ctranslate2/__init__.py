"""The export format ``ctranslate2`` and the formatter ``translation`` for qlora_kit."""

from __future__ import annotations

import qlora_kit
from qlora_kit_ctranslate2.exporter import CTranslate2Exporter, CTranslate2Options
from qlora_kit_ctranslate2.translation import TranslationFormatter

__all__ = ["CTranslate2Exporter", "CTranslate2Options", "TranslationFormatter"]


@qlora_kit.hookimpl
def qlora_kit_register_exporters() -> list[qlora_kit.Exporter]:
    """Register the format; called once, when somebody first asks for a format."""
    return [CTranslate2Exporter()]


@qlora_kit.hookimpl
def qlora_kit_register_formatters() -> list[type[TranslationFormatter]]:
    """Register the formatter; called once, when somebody first asks for one by name."""
    return [TranslationFormatter]
