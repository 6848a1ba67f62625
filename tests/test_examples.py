"""Every example script runs as its docstring says, at small scale, from another folder."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script as ``python examples/NAME ...`` would, and hand back what it printed."""
    monkeypatch.chdir(tmp_path)
    # Scripts set up logging and progress bars for a process of their own.
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:
                raise
        return printed.getvalue()

    return run


def test_every_script_has_a_test_here():
    tested = set(re.findall(r'run\(\s*"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart(run, tiny_llama, tmp_path):
    printed = run("quickstart.py", "--model", tiny_llama, "--steps", 2, "--output", "q")
    assert re.findall(r"^(\d)\. ", printed, re.MULTILINE) == list("123456")
    assert printed.count("   model  ") == 3
    assert re.search(r"2 steps in \d+ s: loss 5\.\d+ -> 5\.\d+", printed)
    for name in ("lora", "merged_16bit", "training"):
        assert any((tmp_path / "q" / name).iterdir())


def test_quickstart_without_a_model_says_what_is_missing(run, tmp_path):
    with pytest.raises(SystemExit, match="ModelNotFoundError: There is nothing at"):
        run("quickstart.py", "--model", tmp_path / "none")


def test_resume_training(run, tiny_llama):
    printed = run("resume_training.py", tiny_llama, "--steps", 4)
    assert "Stopped after 2 of 4 steps" in printed
    assert "Went on to step 4" in printed


def test_own_template(run, tiny_llama):
    printed = run("own_template.py", tiny_llama, "--steps", 1)
    assert "Question: " in printed
    assert "<|im_start|>user" in printed


def test_export_formats(run, adapted, tmp_path):
    from qlora_kit import export_model

    export_model(adapted, "lora", tmp_path / "adapter")
    printed = run("export_formats.py", "adapter", "--formats", "lora", "merged_16bit")
    assert re.search(r"merged_16bit: \S+/formats/merged_16bit \(", printed)
    assert "BAD" not in printed
    assert (tmp_path / "formats" / "lora" / "adapter_model.safetensors").is_file()
