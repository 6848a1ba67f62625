"""``hub``: any other format, pushed to the Hugging Face Hub in one commit."""

from __future__ import annotations

from qlora_kit.exporters.hub.exporter import qlora_kit_register_exporters

__all__ = ["qlora_kit_register_exporters"]
