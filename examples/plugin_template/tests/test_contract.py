"""What users of qlora_kit rely on, checked by qlora_kit itself on tiny models."""

from qlora_kit_template import MyFormatExporter, MyFormatFormatter

import qlora_kit
from qlora_kit.testing import check_exporter, check_formatter


def test_it_is_found():
    listed = qlora_kit.describe_exporters()
    found = next(entry for entry in listed["exporters"] if entry["name"] == "my-format")
    assert found["distribution"] == "qlora-kit-template"
    assert listed["broken"] == []


def test_the_format_keeps_every_promise():
    check_exporter(MyFormatExporter())


def test_the_formatter_keeps_every_promise():
    check_formatter(MyFormatFormatter)
