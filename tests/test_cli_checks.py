"""The command line before a model is loaded, and its errors in flags instead of Python."""

import argparse
import json
import re

import pytest

from qlora_kit.cli import main
from qlora_kit.cli.parser import make_parser, read_columns
from qlora_kit.cli.spelling import EXPORTING, FLAGS, PHRASES, Spelling
from qlora_kit.errors import ConfigError


@pytest.fixture
def folder(tmp_path, alpaca_rows, monkeypatch):
    """A working folder with data in it, and no way to load a model."""
    (tmp_path / "rows.json").write_text(json.dumps(alpaca_rows), encoding="utf-8")
    (tmp_path / "questions.json").write_text('[{"q": "a", "a": "b"}]', encoding="utf-8")
    (tmp_path / "broken.json").write_text('[{"instruction": "a",', encoding="utf-8")
    bad = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)), encoding="utf-8")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}', encoding="utf-8")
    talks = [[{"role": "assistant", "content": "a"}], []]
    chat = "\n".join(json.dumps({"messages": talk}) for talk in talks)
    (tmp_path / "chat.jsonl").write_text(chat, encoding="utf-8")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_kit.load_quantized", _refuse_to_load)
    return tmp_path


def _refuse_to_load(*args, **kwargs):
    raise AssertionError("the model was loaded before everything was checked")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "M", "none.json"], "There is nothing at none.json"),
        (["train", "M", "rows.json", "--eval-data", "none.json"], "nothing at none.json"),
        (["train", "M", "owner/data"], "or allow that here with --download."),
        (["train", "M", "broken.json"], "line 1"),
        (["train", "M", "bad.jsonl"], "'output' is empty"),
        (["train", "M", "bad.jsonl"], "leave them out with --on-bad-rows skip."),
        (["train", "M", "chat.jsonl"], "line 2 (row 2): 'messages' is empty"),
        (["train", "M", "ids.jsonl", "--eos-token", "x"], "as they are. Leave out --eos-token."),
        (["train", "M", "questions.json"], "example --columns instruction=q."),
        (["train", "M", "rows.json", "--columns", "instruction=nope"], "no row of rows.json"),
        (["train", "M", "rows.json", "--columns", "instruction"], "takes ROLE=COLUMN"),
        (["train", "M", "rows.json", "--columns", "answer=output"], "names a role 'answer'"),
        (["train", "M", "rows.json", "--template", "alpca"], "Did you mean 'alpaca'"),
        (["train", "M", "rows.json", "--template", "chat"], "column 'messages'"),
        (["train", "M", "rows.json", "--eval-data", "questions.json"], "questions.json has a"),
        (["train", "M", "rows.json", "--export", "loar"], "Did you mean 'lora'"),
        (["train", "M", "rows.json", "--export-to", "rows.json"], "is a file"),
        (["train", "M", "rows.json", "--export-option", "dtyp=x"], "has an option 'dtyp'"),
        (
            ["train", "M", "rows.json", "--export", "gguf", "--export-option", "quantization=3"],
            "quantization must be str",
        ),
        (
            ["train", "M", "rows.json", "--export-option", "max_shard_size=huge",
             "--export", "merged_16bit"],
            "max_shard_size is a size such as '5GB'",
        ),
        (["train", "M", "rows.json", "--export", "hub"], "needs --export-option repo_id=..."),
        (["train", "M", "rows.json", "--set", "learning_rat=1"], "Did you mean 'learning_rate'"),
        (["train", "M", "rows.json", "--set", "max_steps=0"], "max_steps must be at least 1"),
        (["train", "M", "rows.json", "--set", "truncation=x"], "truncation must be"),
        (["train", "M", "rows.json", "--set", "completion_only_loss=true"], "Use --response-only."),
        (["train", "M", "rows.json", "--set", "assistant_only_loss=true"], "Use --template chat,"),
        (["train", "M", "rows.json", "--set", "eval_strategy=steps"], "on: give --eval-data."),
        (["train", "M", "rows.json", "--r", "0"], "rank"),
        (
            ["train", "M", "rows.json", "--export", "", "--output", "rows.json"],
            "--output rows.json: rows.json is a file",
        ),
        (["train", "M", "rows.json", "--resume"], "--resume, but outputs holds no whole"),
        (["export", "M", "lora", "there"], "Give another path, or --overwrite to replace all"),
        (["export", "M", "lora,merged_16bit"], "Several formats need a path"),
        (["export", "M", "lora"], "needs a path: qlora-kit export MODEL lora out."),
        (["export", "M", "merged_16bit", "x", "--set", "dtyp=x"], "Did you mean 'dtype'"),
        (["export", "M", "hub"], "needs --set repo_id=..."),
        (["generate", "M", "Hi", "--template", "alpca"], "Did you mean 'alpaca'"),
        (["generate", "M", "Hi", "--system", "Be brief."], "goes with --template"),
    ],
)  # fmt: skip
def test_what_can_be_wrong_is_said_before_a_model_is_loaded(folder, arguments, said, capsys):
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said.lower() in error.lower()
    assert not re.search(r"=(True|False|None)\b", error)
    assert sorted(folder.rglob("*")) == before


def test_an_export_in_the_way_is_said_before_a_model_is_loaded(folder, capsys):
    (folder / "outputs" / "lora").mkdir(parents=True)
    (folder / "outputs" / "lora" / "old").touch()
    assert main(["train", "M", "rows.json"]) == 1
    assert "or --overwrite to replace all of it" in capsys.readouterr().err


def test_what_a_format_lacks_here_is_said_before_training(folder, caplog, monkeypatch):
    from qlora_kit.exporters.lora import Lora

    monkeypatch.setattr(Lora, "find_missing", lambda self: ["the frobnicator"], raising=False)
    with pytest.raises(AssertionError, match="the model was loaded"):
        main(["train", "M", "rows.json"])
    assert "lora may not run here: missing: the frobnicator" in caplog.text


# -- spelling ------------------------------------------------------------------------------------


def list_flags():
    """Every flag of every command."""
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {flag for sub in commands.choices.values() for flag in sub._option_string_actions}


def test_every_flag_that_errors_name_exists():
    known = list_flags()
    phrases = {flag for text in PHRASES.values() for flag in re.findall(r"--[\w-]+", text)}
    assert {*FLAGS.values(), *EXPORTING.values(), *phrases, Spelling().setter} <= known
    assert "--export-option" in known


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ("allow it with local_files_only=False.", "allow it with --download."),
        ("Use engine='native'.", "Use --engine native."),
        ("loaded with load_in_4bit=False.", "loaded with --no-4bit."),
        ("leave them out with on_bad_rows='skip'.", "leave them out with --on-bad-rows skip."),
        ("columns={'instruction': 'my question'}.", "--columns 'instruction=my question'."),
        ("Choose with split=..., or", "Choose with --split ..., or"),
        ("resume_from_checkpoint='a/checkpoint-3' goes on", "--resume goes on"),
        ("eos_token='<|im_end|>', for example", "--eos-token '<|im_end|>', for example"),
        ("set gradient_checkpointing=True.", "set --set gradient_checkpointing=true."),
        (
            'Set plan={"micro_batch_tokens": 48, "checkpointing": "full"}, which',
            'Set --set \'plan={"micro_batch_tokens": 48, "checkpointing": "full"}\', which',
        ),
        # Values of other things stay as they are.
        ("needs checkpointing='selective'", "needs checkpointing='selective'"),
        ("YaRN with truncate=False has", "YaRN with truncate=False has"),
        ("/runs/overwrite=True/x is a file", "/runs/overwrite=True/x is a file"),
        ("temperature must be above 0, got 0", "temperature must be above 0, got 0"),
    ],
)
def test_python_is_said_in_flags(python, flags):
    spelling = Spelling()
    spelling.use(FLAGS, "--set", lambda: {"gradient_checkpointing", "plan"})
    assert spelling(python) == flags


def test_a_format_s_option_is_not_the_model_s():
    spelling = Spelling()
    assert spelling("Export with dtype='bfloat16'.") == "Export with --dtype bfloat16."
    spelling.use(EXPORTING, "--export-option", lambda: {"dtype"})
    assert spelling("Export with dtype='bfloat16'.") == (
        "Export with --export-option dtype=bfloat16."
    )


def test_columns_are_read_by_comma_or_one_by_one():
    assert read_columns(["instruction=q, output=a", "input=x=y"]) == {
        "instruction": "q", "output": "a", "input": "x=y",
    }  # fmt: skip
    assert read_columns([]) is None
    with pytest.raises(ConfigError, match="ROLE=COLUMN"):
        read_columns(["=q"])


def test_the_settings_that_can_be_named_are_those_there_are(folder, capsys):
    """What --set takes is asked of the libraries that define it."""
    assert main(["train", "M", "rows.json", "--set", "truncation_mode=keep_end"]) == 1
    assert "Use --set truncation=end" in capsys.readouterr().err
