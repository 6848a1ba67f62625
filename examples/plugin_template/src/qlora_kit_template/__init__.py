"""Adds the export format ``my-format`` and a formatter to qlora_kit."""

import qlora_kit
from qlora_kit_template.exporter import MyFormatExporter
from qlora_kit_template.formatter import MyFormatFormatter

__all__ = ["MyFormatExporter", "MyFormatFormatter"]


@qlora_kit.hookimpl
def qlora_kit_register_exporters():
    """The formats of this package."""
    return [MyFormatExporter()]


@qlora_kit.hookimpl
def qlora_kit_register_formatters():
    """The formatters of this package; leave the hook out if there are none."""
    return [MyFormatFormatter]
