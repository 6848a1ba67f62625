"""The formatter that rows ask for, however they are given, and what is said before a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit import attach_lora, load_quantized, train_sft
from qlora_kit.data import (
    AlpacaFormatter,
    ChatFormatter,
    FormatterBase,
    PromptCompletionFormatter,
    TextFormatter,
    formatter_from_spec,
    plan_formatter,
    read_source,
)
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.training.arguments import DataOptions
from qlora_kit.training.examples import prepare_examples

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi!"}]
KINDS: dict[str, tuple[list[dict[str, Any]], type[FormatterBase]]] = {
    "alpaca": ([{"instruction": "Say.", "input": "", "output": "Hi."}] * 2, AlpacaFormatter),
    "messages": ([{"messages": CHAT}] * 2, ChatFormatter),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi!"}]}],
        ChatFormatter,
    ),
    "prompt-completion": ([{"prompt": "2 + 2 =", "completion": " 4"}] * 2,
                          PromptCompletionFormatter),
    "two parts": ([{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2, ChatFormatter),
    "text": ([{"text": "Once upon a time"}] * 2, TextFormatter),
}  # fmt: skip


def _give(rows: list[dict[str, Any]], form: str, folder: Path) -> Any:
    from datasets import Dataset, DatasetDict

    if form == "list":
        return rows
    if form == "Dataset":
        return Dataset.from_list(rows)
    if form == "DatasetDict":
        return DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])})
    if form == "saved splits":
        _give(rows, "DatasetDict", folder).save_to_disk(folder / "saved")
        return folder / "saved"
    if form == "pandas":
        return pytest.importorskip("pandas").DataFrame(rows)
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return attach_lora(load_quantized(tiny_llama, 128, "float32", False), r=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", ["list", "Dataset", "DatasetDict", "saved splits", "pandas", "jsonl", "parquet"]
)
def test_columns_choose_however_rows_are_given(
    model: Any, kind: str, form: str, tmp_path: Path
) -> None:
    rows, expected = KINDS[kind]
    formatter = expected(model.tokenizer)
    wanted = formatter.encode(rows, max_length=128).dataset.to_list()
    data = prepare_examples(model, _give(rows, form, tmp_path), None, DataOptions(128))
    assert data.dataset.to_list() == wanted
    assert data.summary["template_fingerprint"] == formatter.fingerprint


@pytest.mark.parametrize("form", ["list", "Dataset", "DatasetDict", "jsonl", "parquet"])
def test_token_ids_are_trained_as_they_are_from_files_too(
    model: Any, form: str, tmp_path: Path
) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
    data = prepare_examples(model, _give(rows, form, tmp_path), None, DataOptions(128))
    assert data.dataset["input_ids"][0] == [5, 6, 7]
    assert data.formatter is None


def test_a_file_is_read_once(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from qlora_kit.data.sources import raw_rows as sources

    opened: list[Path] = []
    read = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path: opened.append(path) or read(path))
    prepare_examples(model, _give(KINDS["messages"][0], "jsonl", tmp_path), None, DataOptions(128))
    assert len(opened) == 1


def test_a_bad_row_of_a_recognized_file_keeps_its_line(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}\n' + json.dumps({"messages": CHAT}), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1 \(row 1\): 'messages' is empty"):
        prepare_examples(model, path, None, DataOptions(128))


def test_a_template_that_changes_is_said(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = KINDS["alpaca"][0]
    model.record.formatter = AlpacaFormatter(model.tokenizer, response_only=True)
    prepare_examples(model, rows, None, DataOptions(128))
    assert "To keep it" not in caplog.text, "what carries loss is no template"
    model.record.formatter = AlpacaFormatter(model.tokenizer, "alpaca-zh")
    prepare_examples(model, rows, model.record.formatter, DataOptions(128))
    assert "To keep it" not in caplog.text
    prepare_examples(model, rows, None, DataOptions(128))
    assert "template 'alpaca-zh', and these rows get 'alpaca'" in caplog.text
    model.record.formatter = None


def test_text_leaves_no_earlier_formatter_behind(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = attach_lora(load_quantized(tiny_llama, 128, "float32", False), r=4)
    steps = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "plan": False}
    train_sft(model, KINDS["alpaca"][0], output_dir=tmp_path / "a", **steps)
    assert model.record.formatter.name == "alpaca"
    train_sft(model, KINDS["text"][0], output_dir=tmp_path / "b", **steps)
    assert model.record.formatter is None
    manifest = json.loads((tmp_path / "b" / "qlora_kit_manifest.json").read_text(encoding="utf-8"))
    assert manifest["formatter"] is None
    assert "with the template 'alpaca', and these rows get 'text'" in caplog.text
    # One that was asked for by name is what prompts are to be made with.
    formatter = TextFormatter(model.tokenizer)
    train_sft(model, KINDS["text"][0], formatter=formatter, output_dir=tmp_path / "c", **steps)
    assert model.record.formatter is formatter


# -- prompt and completion -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bos", "metaspace", "words"])
def test_a_completion_carries_loss_and_its_prompt_does_not(
    tokenizers: dict[str, Any], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    formatter = PromptCompletionFormatter(tokenizer)
    row = {"prompt": "<|im_start|>hello", "completion": " world<|im_end|>\n"}
    (example,) = formatter.encode([row], max_length=64).dataset
    prompt = formatter.prompt(row["prompt"])
    start = len(prompt.token_ids)
    assert example["input_ids"][:start] == list(prompt.token_ids)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in prompt.token_ids
    assert set(example["labels"][:start]) == {-100}
    assert example["labels"][start:] == example["input_ids"][start:]
    # The end token once, whether the completion has it or not.
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    assert example["input_ids"].count(tokenizer.eos_token_id) == 1
    bare = {**row, "completion": " world"}
    assert formatter.encode([bare], max_length=64).dataset.to_list() == [example]
    everything = PromptCompletionFormatter(tokenizer, response_only=False)
    (all_trained,) = everything.encode([row], max_length=64).dataset
    assert all_trained["labels"][1:] == all_trained["input_ids"][1:]


def test_conversations_in_two_parts_are_learned_in_the_second(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    longer = [*CHAT, {"role": "user", "content": "And you?"}]
    row = {"asked": longer, "said": json.dumps(CHAT[1:]), "system": "Be kind."}
    named = {"prompt": "asked", "completion": "said"}
    plan = plan_formatter(read_source([row]), columns=named)
    assert plan.kind is ChatFormatter
    plan.check(read_source([row]))
    formatter = plan.make(tokenizer)
    rows = formatter.load([row])
    assert not rows.unused
    start = formatter.prompt([{"role": "system", "content": "Be kind."}, *longer]).token_ids
    (example,) = formatter.encode(rows, max_length=512).dataset
    assert example["input_ids"][: len(start)] == list(start)
    assert set(example["labels"][: len(start)]) == {-100}
    assert tokenizer.decode([i for i in example["labels"] if i != -100]) == "Hi!<|im_end|>"
    joined = {"messages": [{"role": "system", "content": "Be kind."}, *longer, CHAT[1]]}
    (same,) = ChatFormatter(tokenizer, response_only=False).encode([joined], max_length=512).dataset
    whole = ChatFormatter(tokenizer, response_only=False, columns=named, system="Unused.")
    assert whole.encode([row], max_length=512).dataset[0] == same
    # The formatter's own system message stands in front of the prompt too.
    led = ChatFormatter(tokenizer, system="Be kind.").encode(
        [{"prompt": longer, "completion": CHAT[1:]}], max_length=512
    )
    assert led.dataset[0] == example


def test_rows_in_one_part_and_in_two_are_read_together(tokenizers: dict[str, Any]) -> None:
    rows = ChatFormatter(tokenizers["bytes"]).load(
        [{"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:], "note": "x"}]
    )
    assert [row["messages"] for row in rows] == [CHAT, CHAT]
    assert [unused.what for unused in rows.unused] == ["the column 'note'"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi?", "completion": CHAT[1:]}, "'prompt' is text and not a list of messages"),
        ({"prompt": CHAT[:1], "completion": "Hi!"}, "'completion' is text and not a list of"),
        ({"prompt": CHAT[:1], "completion": None}, "'completion' is not a list of messages but"),
        ({"prompt": [], "completion": CHAT[1:]}, "'prompt' is empty"),
        ({"prompt": CHAT, "completion": CHAT[:1]}, "no message of 'completion' is the assistant's"),
        ({"prompt": [{"role": "user"}], "completion": CHAT}, "message 1 of 'prompt' has a content"),
    ],
)
def test_what_is_wrong_with_a_part_is_said(tokenizers: dict[str, Any], row: Any, said: str) -> None:
    raw = read_source([{"prompt": CHAT[:1], "completion": CHAT[1:]}, row])
    with pytest.raises(DataError, match=said):
        plan_formatter(raw).make(tokenizers["bytes"]).load(raw)
    with pytest.raises(DataError, match="ChatFormatter"):
        PromptCompletionFormatter(tokenizers["bytes"]).load(raw)
    with pytest.raises(ConfigError, match="from the one or from"):
        ChatFormatter.map_columns({"messages": "a", "prompt": "b"})


@pytest.mark.parametrize("kind", [PromptCompletionFormatter, TextFormatter])
def test_rendered_texts_prompt_as_they_are_and_come_back_from_their_spec(
    tokenizers: dict[str, Any], kind: Any
) -> None:
    formatter = kind(tokenizers["bos"])
    again = formatter_from_spec(formatter.template_spec(), tokenizers["bos"])
    assert type(again) is kind
    assert again.fingerprint == formatter.fingerprint
    prompt = again.prompt("<|im_start|>hello", "world")
    assert prompt == "<|im_start|>hello\n\nworld"
    assert prompt.token_ids[0] == tokenizers["bos"].bos_token_id
    assert tokenizers["bos"].eos_token_id not in prompt.token_ids
    with pytest.raises(DataError, match="empty"):
        again.prompt(" ")


# -- without a tokenizer -------------------------------------------------------------------------


def test_a_template_is_a_name_a_text_or_a_file(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Q: {instruction}\nA: {output}\n", encoding="utf-8")
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        encoding="utf-8",
    )
    tokenizer = tokenizers["bytes"]

    def ask(template: str) -> str:
        return str(plan_formatter(template=template).make(tokenizer).prompt("Hi"))

    assert ask("alpaca-zh").endswith("### 回答：\n")
    assert ask("chat") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ask("text") == ask("prompt-completion") == "Hi"
    assert ask("Q: {instruction}|{output}") == "Q: Hi|"
    assert ask(str(tmp_path / "own.txt")) == "Q: Hi\nA: "
    assert ask(str(tmp_path / "own.jinja")) == "[user] Hi<|im_end|>[assistant] "
    # The answer ends where it ends: the file's last line break is the editor's.
    spec = plan_formatter(template=str(tmp_path / "own.txt")).make(tokenizer).template_spec()
    assert spec["suffix"] == ""


def test_named_columns_choose_before_others(tokenizers: dict[str, Any]) -> None:
    present = ["instruction", "output", "dialogue"]
    assert plan_formatter(present).kind is AlpacaFormatter
    plan = plan_formatter(present, columns={"messages": "dialogue"})
    assert plan.kind is ChatFormatter
    # A role alone may leave it open: the columns that are there decide then.
    plan = plan_formatter(["prompt", "answer"], columns={"completion": "answer"})
    assert plan.kind is PromptCompletionFormatter
    plan = plan_formatter(present, columns={"messages": "dialogue"})
    row = {"instruction": "x", "output": "y", "dialogue": CHAT}
    assert plan.make(tokenizers["bytes"]).load([row])[0]["messages"] == CHAT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"template": "alpca"}, "Did you mean 'alpaca'"),
        ({"template": "no/such/file.txt"}, "no such file"),
        ({"template": "Q: {instruction}"}, "needs {output} exactly once"),
        ({"template": "chat", "columns": {"instruction": "q"}}, "roles are messages"),
        ({"columns": {"instuction": "q"}}, "Did you mean 'instruction'"),
        ({"template": "text", "system": "Be brief."}, "rendered text already"),
        ({"template": "{instruction}{output}", "system": "Be brief."}, "no {system} placeholder"),
    ],
)
def test_what_cannot_work_is_said_without_a_tokenizer(arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_formatter(["instruction", "output"], **arguments)
    assert said in str(caught.value)


def test_absent_columns_are_said_without_a_tokenizer() -> None:
    source = read_source([{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match="has a column 'instruction' or 'output'"):
        plan_formatter(source.columns).check(source)
    named = {"instruction": "question", "output": "answer"}
    plan_formatter(source.columns, columns=named).check(source)
    sharegpt = read_source(KINDS["sharegpt"][0])
    plan_formatter(sharegpt.columns).check(sharegpt)
    with pytest.raises(DataError, match="no rows"):
        plan_formatter().check(read_source([]))
