"""Installed libraries outside the tested ranges are named, once."""

import logging
from importlib import metadata

import pytest

from qlora_kit.engines.selection import resolve_engine
from qlora_kit.versions import find_untested, warn_of_untested


def test_what_is_outside_a_range_is_named_with_both_versions():
    torch = metadata.version("torch")
    found = find_untested(
        ["torch<1", "pluggy>=1", "no-such-package<1", "(broken", 'trl<1; extra == "unsloth"',
         "peft<0.1; python_version < '3'"],
    )  # fmt: skip
    assert found == [f"torch {torch} (tested: <1)"]


def test_an_extras_requirements_count_where_it_is_used():
    assert len(find_untested(['pluggy<1; extra == "unsloth"'], "unsloth")) == 1


def test_our_own_requirements_are_read_and_met():
    lines = metadata.requires("qlora-kit")
    assert any(line.startswith("transformers") for line in lines)
    assert find_untested(lines) == []


@pytest.fixture
def strange_metadata(tmp_path, monkeypatch):
    """This package, installed by someone who asked for a torch that is not here."""
    folder = tmp_path / "qlora_kit-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: qlora-kit\nVersion: 9.9\nRequires-Dist: torch<1\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    warn_of_untested.cache_clear()
    yield
    warn_of_untested.cache_clear()


def test_choosing_an_engine_warns_once(strange_metadata, caplog):
    with caplog.at_level(logging.WARNING, "qlora_kit"):
        resolve_engine("native")
        resolve_engine("native")
    (record,) = [r for r in caplog.records if "tested with" in r.getMessage()]
    assert f"torch {metadata.version('torch')} (tested: <1)" in record.getMessage()
