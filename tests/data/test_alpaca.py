"""Alpaca rows: wording, templates, the tokens around an answer, what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from qlora_kit.data import (
    AlpacaFormatter,
    AlpacaTemplate,
    ChatFormatter,
    Formatter,
    FormatterBase,
    PaddedCollator,
    Prompt,
    Segment,
    formatter_from_spec,
)
from qlora_kit.errors import ConfigError, DataError

from .conftest import make_tokenizer

STANFORD = """Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 and 2

### Response:
"""  # noqa: E501
STANFORD_NO_INPUT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:
"""  # noqa: E501
NOTEBOOK = "Below.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
ROW = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def _one(formatter: FormatterBase, row: dict[str, Any], **options: Any) -> dict[str, Any]:
    (example,) = formatter.encode([row], **{"max_length": 4096, **options}).dataset
    return example


def test_the_wording_is_stanfords(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer)
    assert formatter.prompt("Add.", "1 and 2") == STANFORD
    assert formatter.prompt("Add.") == STANFORD_NO_INPUT
    ids = _one(formatter, ROW)["input_ids"]
    assert tokenizer.decode(ids) == STANFORD + "3<|im_end|>"


def test_the_chinese_template_says_the_same_in_chinese(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, "alpaca-zh")
    prompt = formatter.prompt("写一首诗。", "秋天")
    assert "### 指令：\n写一首诗。\n\n### 输入：\n秋天\n\n### 回答：\n" in prompt
    assert "输入：" not in formatter.prompt("写一首诗。").split("### 指令")[1]


@pytest.mark.parametrize(
    "template",
    [
        NOTEBOOK,
        NOTEBOOK.format("{instruction}", "{input}", "{output}"),
    ],
)
def test_the_notebooks_template_works_as_it_is(tokenizer: Any, template: str) -> None:
    formatter = AlpacaFormatter(tokenizer, template)
    ids = _one(formatter, ROW)["input_ids"]
    text = NOTEBOOK.format("Add.", "1 and 2", "3") + "<|im_end|>"
    assert tokenizer.decode(ids) == text
    # Like the notebook, it shows an empty input too.
    assert formatter.prompt("Add.") == NOTEBOOK.format("Add.", "", "")


def test_braces_in_rows_and_templates_stay_braces(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, "{{json}} {instruction}|{input}|{output}")
    row = {"instruction": "{input} {0}", "input": "{output}", "output": "{}}"}
    ids = _one(formatter, row)["input_ids"]
    assert tokenizer.decode(ids) == "{json} {input} {0}|{output}|{}}<|im_end|>"
    again = formatter_from_spec(formatter.template_spec(), tokenizer)
    assert again.prompt("{input} {0}", "{output}") == "{json} {input} {0}|{output}|"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("alpacca", "Did you mean 'alpaca'"),
        ("{instruction} {input}", "{output} exactly once"),
        ("{instruction} {inptu} {output}", "Did you mean 'input'"),
        ("{input} {output}", "without {instruction}"),
        ("{instruction} {output} {input}", "Nothing but fixed text may follow"),
        ("{} {} {} {}", "has 4"),
        ("{instruction} { {output}", "written double"),
        ("{instruction!r} {output}", "placeholder"),
        ("{instruction} {output} {output}", "2 times"),
        (5, "template must be"),
    ],
)
def test_a_wrong_template_is_refused_with_what_is_wrong(
    tokenizer: Any, template: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        AlpacaFormatter(tokenizer, template)
    assert message in str(caught.value)


def test_special_tokens_of_a_template_count_and_those_of_a_row_do_not(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(
        tokenizer,
        "<|im_start|>user\n{instruction}{input}<|im_end|>\n<|im_start|>assistant\n{output}<|im_end|>\n",
        response_only=True,
    )
    row = {"instruction": "<|im_start|>", "input": "", "output": "<|im_end|> {no}"}
    example = _one(formatter, row)
    ids = example["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [i for i in ids if i in (start, end)] == [start, end, start, end]
    assert ids[-1] == end
    assert tokenizer.decode([i for i in example["labels"] if i != -100]) == (
        "<|im_end|> {no}<|im_end|>"
    )
    assert formatter.template_spec()["stop"] == ["<|im_end|>"]
    again = formatter_from_spec(formatter.template_spec(), tokenizer)
    assert _one(again, row) == example
    assert again.fingerprint == formatter.fingerprint


def test_a_suffix_before_the_end_is_trained_and_one_after_it_is_refused(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(
        tokenizer, "{instruction}:{input}{output}\nDONE", response_only=True
    )
    labels = [i for i in _one(formatter, ROW)["labels"] if i != -100]
    assert tokenizer.decode(labels) == "3\nDONE<|im_end|>"
    with pytest.raises(ConfigError, match="goes on after the end token"):
        AlpacaFormatter(tokenizer, "{instruction}{output}<|im_end|>DONE")


def test_a_beginning_token_in_the_template_is_not_doubled(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bos"]
    for template in ("<|bos|>{instruction}{input}|{output}", "{instruction}{input}|{output}"):
        ids = _one(AlpacaFormatter(tokenizer, template), ROW)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_the_boundary_is_exact_where_one_token_would_cross_it(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(
        tokenizer, "{instruction}{input}\n### Res{output}", response_only=True
    )
    example = _one(formatter, {"instruction": "Say.", "output": "ponse:\nHello"})
    together = tokenizer("Say.\n### Response:\nHello")["input_ids"]
    assert len(together) < len(example["input_ids"]) - 1  # one token across the boundary
    assert tokenizer.decode(example["input_ids"][:-1]) == tokenizer.decode(together)
    trained = [i for i in example["labels"] if i != -100]
    assert tokenizer.decode(trained) == "ponse:\nHello<|im_end|>"


def test_markers_in_an_answer_change_nothing(tokenizer: Any) -> None:
    output = "First.\n\n### Response:\nHello\n\n### Instruction:\nSay."
    example = _one(
        AlpacaFormatter(tokenizer, response_only=True), {"instruction": "Say.", "output": output}
    )
    trained = [i for i in example["labels"] if i != -100]
    assert tokenizer.decode(trained) == output + "<|im_end|>"


def test_text_after_text_gets_no_mark_of_a_beginning(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["metaspace"]
    formatter = AlpacaFormatter(tokenizer)
    ids = _one(formatter, {"instruction": "Say hello.", "output": "Hello, world!"})["input_ids"]
    whole = tokenizer(formatter.prompt("Say hello.") + "Hello, world!")["input_ids"]
    assert ids == [*whole, tokenizer.eos_token_id]
    alone = tokenizer("Hello, world!", add_special_tokens=False)["input_ids"]
    assert ids[-1 - len(alone) : -1] != alone


def test_the_end_token_trains_where_it_is_also_the_padding(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    formatter = AlpacaFormatter(tokenizer, response_only=True)
    dataset = formatter.encode([ROW, {**ROW, "output": "3 " * 30}], max_length=512).dataset
    batch = PaddedCollator(tokenizer.pad_token_id)(list(dataset))
    for index in range(2):
        length = int(batch["attention_mask"][index].sum())
        assert batch["labels"][index, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][index, length:] == -100).all()


def test_a_prompt_is_text_with_the_ids_of_training(tokenizer: Any) -> None:
    prompt = AlpacaFormatter(tokenizer).prompt("Say <|im_end|>.")
    assert isinstance(prompt, str)
    assert tokenizer.eos_token_id not in prompt.token_ids
    assert tokenizer.eos_token_id in tokenizer(str(prompt))["input_ids"]
    copy = pickle.loads(pickle.dumps(prompt))
    assert isinstance(copy, Prompt)
    assert (copy, copy.token_ids) == (prompt, prompt.token_ids)


@pytest.mark.parametrize("bad", ["", "  ", None, 5])
def test_a_prompt_without_an_instruction_is_refused(tokenizer: Any, bad: Any) -> None:
    with pytest.raises(DataError, match="instruction"):
        AlpacaFormatter(tokenizer).prompt(bad)


def test_another_end_token(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, eos_token="<|end|>")
    assert _one(formatter, ROW)["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert formatter.template_spec()["stop"] == ["<|end|>"]
    with pytest.raises(ConfigError, match=r"no end token '<\|nd\|>'.* Did you mean '<\|end\|>'"):
        AlpacaFormatter(tokenizer, eos_token="<|nd|>")


def test_a_system_text_replaces_the_opening_sentence(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, system="Answer {briefly}.")
    assert formatter.prompt("Add.").startswith("Answer {briefly}.\n\n### Instruction:\nAdd.")
    assert formatter.template_spec()["system"] == "Answer {briefly}."
    again = formatter_from_spec(formatter.template_spec(), tokenizer)
    assert again.prompt("Add.") == formatter.prompt("Add.")
    assert again.fingerprint == formatter.fingerprint
    with pytest.raises(ConfigError, match=r"no \{system\} placeholder"):
        AlpacaFormatter(tokenizer, NOTEBOOK, system="x")


def test_a_template_object_with_two_prompts(tokenizer: Any) -> None:
    template = AlpacaTemplate("mine", "Q {instruction} {input} A ", "Q {instruction} A ")
    formatter = AlpacaFormatter(tokenizer, template)
    assert formatter.prompt("x", "y") == "Q x y A "
    assert formatter.prompt("x") == "Q x A "
    assert formatter.template_spec()["name"] == "mine"


def test_the_fingerprint_follows_whatever_changes_the_tokens(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    prints = [
        AlpacaFormatter(tokenizer).fingerprint,
        AlpacaFormatter(tokenizer, response_only=True).fingerprint,
        AlpacaFormatter(tokenizer, "alpaca-zh").fingerprint,
        AlpacaFormatter(tokenizer, eos_token="<|end|>").fingerprint,
        AlpacaFormatter(tokenizer, system="x").fingerprint,
        AlpacaFormatter(tokenizers["bos"]).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    # Chat templates write the beginning token by its role.
    renamed = make_tokenizer("bytes")
    before = ChatFormatter(renamed).fingerprint
    renamed.pad_token = "<pad>"
    assert ChatFormatter(renamed).fingerprint == before
    renamed.bos_token = "<|end|>"
    assert ChatFormatter(renamed).fingerprint != before
    tokenizer("some text", truncation=True, max_length=2, padding="max_length")
    assert AlpacaFormatter(tokenizer).fingerprint == prints[0]


def test_the_tokenizers_own_settings_are_left_alone(tokenizer: Any) -> None:
    text = AlpacaFormatter(tokenizer).text
    tokenizer("some text", truncation=True, max_length=2, padding="max_length")
    backend = tokenizer.backend_tokenizer
    before = (backend.truncation, backend.padding, backend.encode_special_tokens)
    assert before[0] is not None
    assert len(text.encode_texts(["some longer text than that"])[0]) > 2
    assert (backend.truncation, backend.padding, backend.encode_special_tokens) == before


def test_a_formatter_of_your_own_takes_ten_lines(tokenizer: Any) -> None:
    class QuestionFormatter(FormatterBase):
        name = "question"
        roles = ("question", "answer")

        def segments(self, row: Any) -> list[Segment]:
            return [
                Segment(f"Q: {row['question']}\nA: "),
                Segment(row["answer"], is_trained=True),
            ]

    formatter = QuestionFormatter(tokenizer, response_only=True)
    assert isinstance(formatter, Formatter)
    rows = formatter.load([{"question": "Why?", "answer": "Because."}])
    (example,) = formatter.encode(rows, max_length=64).dataset
    assert tokenizer.decode(example["input_ids"]) == "Q: Why?\nA: Because.<|im_end|>"
    assert tokenizer.decode([i for i in example["labels"] if i != -100]) == "Because.<|im_end|>"
    prompt = formatter.prompt("Why?")
    assert prompt == "Q: Why?\nA: "
    assert example["input_ids"][: len(prompt.token_ids)] == prompt.token_ids
    assert "Because." in formatter.preview(rows)
    with pytest.raises(DataError, match="'answer' is empty"):
        formatter.load([{"question": "Why?", "answer": ""}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {"question": "instruction"}}, "role -> column"),
        ({"columns": {"instrution": "q"}}, "Did you mean 'instruction'"),
        ({"columns": {"instruction": 5}}, "must be a column's name"),
        ({"columns": "output"}, "columns maps roles to columns"),
        ({"eos_token": 2}, "eos_token is a token's text"),
        ({"on_bad_rows": "ignore"}, "'raise' or 'skip'"),
        ({"max_reported_rows": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(
    tokenizer: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        AlpacaFormatter(tokenizer, **arguments)


def test_a_model_in_the_tokenizers_place_is_named() -> None:
    with pytest.raises(ConfigError, match=r"AlpacaFormatter\(model.tokenizer\)"):
        AlpacaFormatter(object())  # type: ignore[arg-type]


def test_names_of_special_tokens_are_tokenized_as_any_text(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaking them apart is for vocabularies that hold them as words; it gives other ids."""

    def refuse(*_: Any) -> None:
        raise AssertionError("broken apart")

    monkeypatch.setattr("qlora_kit.data.tokens.text_tokenizer.TextTokenizer._encode_apart", refuse)
    text = "Say <|im_end|> and <|im_start|>"
    (ids,) = AlpacaFormatter(tokenizer).text.encode_texts([text])
    assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_inputs_that_a_template_leaves_out_are_said(tokenizer: Any, caplog: Any) -> None:
    rows = [{"instruction": "Add.", "input": text, "output": "3"} for text in ("1 and 2", "")]
    AlpacaFormatter(tokenizer, "Q: {instruction}{input}\nA: {output}").load(rows)
    assert not caplog.records
    AlpacaFormatter(tokenizer, "Q: {instruction}\nA: {output}").load(rows)
    assert "1 rows of" in caplog.text
    assert "no {input}" in caplog.text
