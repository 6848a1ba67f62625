"""``generate`` over files and ``chat``: what is asked, what is kept, what is refused."""

import io
import json
import sys

import pytest

from qlora_kit.cli import main

ROWS = [
    {"instruction": "Say the number 3.", "input": "", "output": "3"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    {"prompt": "The quick brown fox"},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]},
]
LOADING = ["--max-seq-length", "128", "--dtype", "float32"]
SAMPLED = ["--max-new-tokens", "6", "--set", "temperature=1.5", "--set", "seed=3"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def answer(tiny_qwen3, rows, tmp_path):
    """Run the command on the rows; returns the status and the output file."""
    output = tmp_path / "answers.jsonl"

    def run(*more):
        arguments = ["--input", str(rows), "--output", str(output), *LOADING, *SAMPLED, *more]
        return main(["generate", str(tiny_qwen3), *arguments]), output

    return run


def test_every_kind_of_row_is_answered_and_a_torn_output_finished(answer, capsys):
    status, output = answer()
    said = capsys.readouterr()
    assert status == 0
    assert "4 answers" in said.out
    assert "1 conversations end with an answer" in said.err
    whole = output.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["messages"] == [{"role": "user", "content": "Hello"}]
    assert all(0 < line["token_count"] <= 6 for line in lines)
    # Killed in the middle of the second line: the rest is sampled as it would have been.
    output.write_text(whole[: whole.index("\n") + 20], encoding="utf-8")
    assert answer()[0] == 0
    said = capsys.readouterr()
    assert "is torn" in said.err
    assert "has 1 of 4 answers" in said.err
    assert output.read_text(encoding="utf-8") == whole
    assert answer("--json")[0] == 0
    assert json.loads(capsys.readouterr().out)["found_there"] == 4
    # Another setting, then another question.
    assert answer("--set", "top_k=5")[0] == 1
    assert "settings of row 0" in capsys.readouterr().err
    output.write_text(whole.replace("Hello", "Bye"), encoding="utf-8")
    assert answer()[0] == 1
    assert "messages of row 1" in capsys.readouterr().err
    assert answer("--overwrite")[0] == 0
    assert output.read_text(encoding="utf-8") == whole


def test_rows_that_ask_nothing_are_named(answer, rows, capsys):
    bad = [{"instruction": ""}, {"messages": [{"role": "assistant", "content": "x"}]}, {"a": 1}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*bad, ROWS[2]]), encoding="utf-8")
    status, output = answer()
    assert status == 1
    assert "3 of 4 rows cannot be asked" in capsys.readouterr().err
    assert not output.exists()
    assert answer("--on-bad-rows", "skip")[0] == 0
    assert "Skipped 3 of 4 rows" in capsys.readouterr().err
    (line,) = output.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["row"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give an instruction"),
        (["--output", "x.jsonl"], "--output goes with --input"),
        (["Hello", "--output", "x.jsonl"], "give no instruction"),
        (["--input", "ROWS", "--output", "ROWS"], "the file that --input names"),
        (["--input", "ROWS", "--output", "none/x.jsonl"], "a folder that exists"),
        (["--input", "ROWS", "--output", "x.jsonl", "--at-once", "0"], "at least 1"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    rows, tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    given = [str(rows) if part == "ROWS" else part for part in arguments]
    assert main(["generate", "./no/such/model", *given]) == 1
    assert said in capsys.readouterr().err


def test_a_conversation_is_remembered_reset_and_compared(
    tiny_qwen3, make_adapted, tmp_path, monkeypatch, capsys
):
    from qlora_kit import export_model, generate_stream

    adapted = make_adapted(tiny_qwen3, std=0.5)
    export_model(adapted, "lora", tmp_path / "lora", verify=False)
    lines = ["Hello", "/history", "/system Be short.", '"""', "one", 'two"""', "/history",
             "/compare", "three\\", "four", "/resett", "/reset", "/history",
             "/exit", "never"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    arguments = ["chat", str(tmp_path / "lora"), "--compare", "--max-new-tokens", "5"]
    assert main([*arguments, "--template", "chat", *LOADING]) == 0
    said = capsys.readouterr().out

    def write(messages):
        return "".join(chunk.text for chunk in generate_stream(adapted, messages, max_new_tokens=5))

    hello = [{"role": "user", "content": "Hello"}]
    with adapted.model.disable_adapter():
        base = write(hello)
    tuned = write(hello)
    assert tuned != base
    name = tmp_path / "lora"
    assert said.startswith(f"[{name}]\n{tuned}\n[without the adapter]\n{base}\nuser: Hello\n")
    system = {"role": "system", "content": "Be short."}
    first = [system, {"role": "user", "content": "one\ntwo"}]
    reply = {"role": "assistant", "content": write(first)}
    second = write([*first, reply, {"role": "user", "content": "three\nfour"}])
    assert f"Comparing is off.\n{second}\n" in said
    assert "There is no /resett. Did you mean '/reset'?" in said
    assert said.endswith("A new conversation.\nsystem: Be short.\n")


def test_one_process_at_a_time_answers_into_a_file(answer, tmp_path, capsys):
    from qlora_kit.file_locks import take_lock

    lock = take_lock(tmp_path / ".answers.jsonl.lock")
    status, output = answer()
    assert status == 1
    assert "Another process is answering into" in capsys.readouterr().err
    assert not output.exists()
    lock.release()
    assert answer()[0] == 0
    assert [path.name for path in tmp_path.glob(".*")] == []
