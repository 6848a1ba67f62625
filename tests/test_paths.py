"""What messages offer in place of a path that does not exist."""

from pathlib import Path

import pytest

from qlora_kit import AlpacaFormatter, load_quantized
from qlora_kit.errors import ConfigError, DataNotFoundError, ModelNotFoundError, OfflineError
from qlora_kit.paths import expand_path, looks_like_hub_name


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """The working directory, with some files and folders in it."""
    for name in ("outputs/run-1", "Qwen3-4B-local", "notes", ".git"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rows.json").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["someone/some-model", "gpt2", "outputs/z"])
def test_a_hub_name_is_offered_no_path_that_does_not_resemble_it(name, beside):
    with pytest.raises(OfflineError) as caught:
        load_quantized(name)
    assert "Did you mean" not in str(caught.value)
    assert str(beside) not in str(caught.value)
    assert "holds" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "offered"), [("Qwen3-4B-lokal", "Qwen3-4B-local"), ("outputs/run1", "outputs/run-1")]
)
def test_a_hub_name_that_resembles_a_path_is_offered_it_whole(name, offered, beside):
    with pytest.raises(OfflineError, match=rf"Did you mean '{offered}'\? Download the model first"):
        load_quantized(name)


def test_a_path_is_offered_what_resembles_it_or_else_what_is_there(beside, tiny_llama):
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'outputs/run-1'\?$"):
        load_quantized("./outputs/run-7/last")
    with pytest.raises(ModelNotFoundError, match=rf"{beside}/outputs holds: run-1\.$"):
        load_quantized("./outputs/zzz")
    with pytest.raises(
        ModelNotFoundError, match=r"holds: Qwen3-4B-local, notes, outputs, rows\.json"
    ):
        load_quantized(f"./{'a' * 300}/b")
    formatter = AlpacaFormatter(load_quantized(tiny_llama, 64, load_in_4bit=False).tokenizer)
    with pytest.raises(DataNotFoundError, match=r"Did you mean 'rows\.json'\?"):
        formatter.load("row.json")
    with pytest.raises(OfflineError, match=r"local hub cache\. Download the dataset first"):
        formatter.load("someone/alpaca")


@pytest.mark.parametrize(
    ("name", "suffixes", "expected"),
    [
        ("gpt2", (), True),
        ("Qwen/Qwen2.5-0.5B", (".gguf",), True),
        ("a/b/c", (), False),
        ("./here", (), False),
        ("~/model", (), False),
        ("/abs", (), False),
        ("owner/", (), False),
        ("owner/.hidden", (), False),
        ("C:\\models\\x", (), False),
        ("two words", (), False),
        ("model.gguf", (".gguf",), False),
        ("model.gguf", (".json",), True),
        ("rows.JSON", (".json",), False),
        ("model.safetensors", (), False),
    ],
)
def test_what_may_be_a_hub_name(name, suffixes, expected):
    assert looks_like_hub_name(name, suffixes) is expected


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~nobody-here/x", "home of a user that does not exist"),
        ("a\0b", "cannot be a path: embedded null"),
        ("x" * 300, "cannot be a path: File name too long"),
        ("/".join(["x" * 99] * 60), r"\.\.\., 5999 characters, cannot be a path"),
    ],
)
def test_what_no_file_system_can_hold_is_named(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expand_path("~") == Path.home()
    assert expand_path("not-there/x") == Path("not-there/x")
    with pytest.raises(ConfigError, match=said):
        expand_path(path)
