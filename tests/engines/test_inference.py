"""What generating does to the settings of a model, and how prints are kept off standard output."""

import contextlib
import io
import json
import logging
import shutil
import sys

import pytest

from qlora_kit import generate_stream, load_quantized
from qlora_kit.engines.captured_prints import log_prints_of
from qlora_kit.engines.inference import inference_mode


def test_a_length_that_the_checkpoint_states_neither_warns_nor_limits(
    tiny_llama, tmp_path, caplog, monkeypatch
):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stated, "max_length": 12}))
    model = load_quantized(folder, dtype="float32", load_in_4bit=False, engine="native")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    chunks = list(generate_stream(model, "Below is an instruction", max_new_tokens=9))
    assert chunks[-1].token_count == 9
    assert "max_length" not in caplog.text
    assert model.model.generation_config.max_length == 12


def test_prints_of_one_package_are_logged_and_all_others_pass(caplog):
    def make_printer(module):
        printer = {"__name__": module}
        exec("def say(text, **options): print(text, **options)", printer)
        return printer["say"]

    theirs, ours = make_printer("Chatty.models"), make_printer("__main__")
    logger = logging.getLogger("qlora_kit.test")
    with caplog.at_level("INFO"), contextlib.redirect_stdout(io.StringIO()) as out:
        first, second = log_prints_of("chatty", logger), log_prints_of("chatty", logger)
        first.__enter__()
        second.__enter__()
        theirs("half a ", end="")
        theirs("line\n\nand another")
        ours("to the program", flush=True)
        theirs("an end without a new line", end="")
        # As when two threads leave in the order in which they came.
        first.__exit__(None, None, None)
        theirs(" that goes on")
        second.__exit__(None, None, None)
        assert sys.stdout is out
        theirs("later")
    assert out.getvalue() == "to the program\nlater\n"
    assert [record.getMessage() for record in caplog.records] == [
        "half a line", "and another", "an end without a new line that goes on",
    ]  # fmt: skip


def test_a_model_that_trains_again_between_two_readers_is_left_training(make_adapted):
    model, tokenizer = make_adapted().model, _Tokenizer()
    model.train()
    first, second = inference_mode(model, tokenizer), inference_mode(model, tokenizer)
    first.__enter__()
    model.train()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model.training, "the second still reads"
    second.__exit__(None, None, None)
    assert model.training


def test_a_switch_that_fails_leaves_no_reader_behind(make_adapted):
    model, tokenizer = make_adapted().model, _Tokenizer()
    model.train()

    def fail(_):
        raise RuntimeError("cannot switch")

    with pytest.raises(RuntimeError, match="cannot switch"):
        inference_mode(model, tokenizer, switch=fail).__enter__()
    with inference_mode(model, tokenizer):
        assert not model.training
    assert model.training


class _Tokenizer:
    padding_side = "right"
