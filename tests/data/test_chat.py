"""Conversations under templates as they are found: ChatML, Llama 3, Qwen 3, Mistral, plain."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_kit.data import ChatFormatter, formatter_from_spec
from qlora_kit.errors import ConfigError, DataError

from .conftest import make_tokenizer

#: Llama 3: trims content, writes its own beginning token.
LLAMA = (
    "{% for message in messages %}{% set content = '<|im_start|>' + message['role'] + '<|end|>\n\n'"
    " + message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|end|>\n\n' }}{% endif %}"
)
#: Qwen 3: an empty thought before the last answer only.
QWEN = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ message.content }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
#: R1: its generation prompt opens a thought that the history leaves out.
R1 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
#: Mistral: no generation prompt at all, and strict about turns.
MISTRAL = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
#: No token ends a turn.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes."},
]


def _trained(formatter: ChatFormatter, row: Any) -> list[str]:
    """The stretches of text that carry loss."""
    (example,) = formatter.encode([row], max_length=4096).dataset
    runs: list[list[int]] = [[]]
    for label in example["labels"]:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [formatter.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["Hello<|im_end|>", "Yes.<|im_end|>"]),
        (LLAMA, ["Hello<|im_end|>", "Yes.<|im_end|>"]),
        (QWEN, ["Hello<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"]),
        (R1, ["Hello<|im_end|>", "Yes.<|im_end|>"]),
        (MISTRAL, ["Hello<|im_end|>", "Yes.<|im_end|>"]),
        (PLAIN, ["Hello\n", "Yes.\n<|im_end|>"]),
    ],
    ids=["chatml", "llama", "qwen", "r1", "mistral", "plain"],
)
def test_the_assistants_turns_carry_loss(
    tokenizers: dict[str, Any], template: str | None, expected: list[str]
) -> None:
    tokenizer = tokenizers["bos"]
    formatter = ChatFormatter(tokenizer, chat_template=template)
    row = {"messages": TALK}
    assert _trained(formatter, row) == expected
    # The same tokens as the library's own rendering, up to white space after the last turn.
    own = tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
    (example,) = formatter.encode([row], max_length=4096).dataset
    ids = tokenizer(own.rstrip("\n"), add_special_tokens=False)["input_ids"]
    if template != PLAIN:
        assert example["input_ids"] == ids
    everything = ChatFormatter(tokenizer, chat_template=template, response_only=False)
    (whole,) = everything.encode([row], max_length=4096).dataset
    assert whole["input_ids"] == example["input_ids"]
    assert whole["labels"] == [-100, *whole["input_ids"][1:]]
    again = formatter_from_spec(formatter.template_spec(), tokenizer)
    assert again.fingerprint == formatter.fingerprint
    assert _trained(again, row) == expected  # type: ignore[arg-type]


def test_generation_markers_decide_where_they_exist(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}bot> {% generation %}{{ m.content }}"
        "<|im_end|>\n{% endgeneration %}{% else %}{{ m.role }}> {{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}bot> {% endif %}"
    )
    formatter = ChatFormatter(tokenizer, chat_template=template)
    assert _trained(formatter, {"messages": TALK}) == ["Hello<|im_end|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize("template", [None, LLAMA, MISTRAL])
def test_a_prompt_is_the_start_of_its_training_example(
    tokenizers: dict[str, Any], template: str | None
) -> None:
    formatter = ChatFormatter(tokenizers["bos"], chat_template=template)
    (example,) = formatter.encode([{"messages": TALK}], max_length=4096).dataset
    prompt = formatter.prompt(TALK[:3])
    size = len(prompt.token_ids)
    assert example["input_ids"][:size] == prompt.token_ids
    assert example["labels"][size] != -100
    assert example["labels"][size - 1] == -100


def test_names_of_special_tokens_in_messages_stay_text(tokenizer: Any) -> None:
    formatter = ChatFormatter(tokenizer)
    talk = [
        {"role": "user", "content": "What ends <|im_end|>\n<|im_start|>assistant\nthis?"},
        {"role": "assistant", "content": "<|im_end|> does."},
    ]
    (example,) = formatter.encode([{"messages": talk}], max_length=4096).dataset
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = example["input_ids"]
    assert [i for i in ids if i in (start, end)] == [start, end, start, end]
    assert _trained(formatter, {"messages": talk}) == ["<|im_end|> does.<|im_end|>"]
    prompt = formatter.prompt(talk[:1])
    assert prompt.token_ids == ids[: len(prompt.token_ids)]
    assert talk[0]["content"] in prompt


def test_sharegpt_conversations(tokenizer: Any) -> None:
    formatter = ChatFormatter(tokenizer, system="Be kind.")
    rows = formatter.load(
        [
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            }
        ]
    )
    assert rows[0]["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    (example,) = formatter.encode(rows, max_length=512).dataset
    assert tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\nBe kind.<|im_end")
    named = ChatFormatter(tokenizer, columns={"messages": "dialogue"})
    assert named.load([{"dialogue": TALK}])[0]["messages"] == TALK


def test_the_end_token_is_the_templates_where_the_tokenizers_differs() -> None:
    tokenizer = make_tokenizer("bos")
    tokenizer.eos_token = "<|end|>"
    formatter = ChatFormatter(tokenizer)
    assert formatter.eos_token == "<|im_end|>"
    assert formatter.template_spec()["stop"] == ["<|im_end|>", "<|end|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi"}, "not a list of messages"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no message is the assistant's"),
        ({"messages": [*TALK, {"role": "assistant", "content": ""}]}, "message 5 .* is empty"),
        ({"messages": [*TALK, {"role": "assistant", "content": 5}]}, r"is a number|number \(5\)"),
        ({"messages": [*TALK, {"role": "assistant"}]}, "message 5 has a content that is null"),
        ({"messages": [{"content": "Hi"}, *TALK]}, "message 1 has no 'role'"),
        ({"messages": ["Hi", *TALK]}, "message 1 is str, not an object"),
    ],
)
def test_bad_conversations_are_named(tokenizer: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatFormatter(tokenizer).load([{"messages": TALK}, row])


def test_what_the_template_refuses_is_reported_for_all_rows_at_once(tokenizer: Any) -> None:
    rows = [{"messages": TALK}, {"messages": TALK[1:]}, {"messages": TALK[:2] * 2}]
    rows.append({"messages": [TALK[0], *TALK]})
    formatter = ChatFormatter(tokenizer, chat_template=MISTRAL)
    with pytest.raises(DataError) as caught:
        formatter.encode(rows, max_length=512)
    text = str(caught.value)
    assert "2 of 4 rows" in text
    assert "row 2" in text
    assert "row 4" in text
    assert "roles must alternate" in text
    skipping = ChatFormatter(tokenizer, chat_template=MISTRAL, on_bad_rows="skip")
    report = skipping.encode(rows, max_length=512).report
    assert (report.examples, report.unusable) == (2, 2)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: Any) -> None:
    template = (
        "{{ messages | length }} messages\n{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="rewrites what comes before message 2"):
        ChatFormatter(tokenizer, chat_template=template).encode(
            [{"messages": TALK}], max_length=512
        )


def test_a_tokenizer_without_a_template_says_so() -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        ChatFormatter(tokenizer)


def test_tools_reach_the_template_from_a_list_or_from_json(tokenizer: Any) -> None:
    template = "{% for tool in tools or [] %}tool {{ tool.name }}\n{% endfor %}" + TOOLS
    formatter = ChatFormatter(tokenizer, chat_template=template)
    tools = [{"name": "add <|im_end|>"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]}
    for given in (tools, json.dumps(tools)):
        rows = formatter.load([{"messages": [*TALK, call], "tools": given}])
        assert rows[0]["tools"] == tools
        (example,) = formatter.encode(rows, max_length=512).dataset
        assert tokenizer.decode(example["input_ids"]).startswith(
            "tool add <|im_end|>\n<|im_start|>"
        )
        prompt = formatter.prompt(TALK[:1], tools=tools)
        assert example["input_ids"][: len(prompt.token_ids)] == prompt.token_ids
    with pytest.raises(DataError, match="'tools' is not a JSON list"):
        formatter.load([{"messages": TALK, "tools": "add"}])
    with pytest.raises(DataError, match="'tools' is not a list of objects"):
        formatter.load([{"messages": TALK, "tools": ["add"]}])


def test_content_in_text_parts_is_joined(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    rows = ChatFormatter(tokenizer).load([{"messages": [TALK[0], {**TALK[1], "content": parts}]}])
    assert rows[0]["messages"] == TALK[:2]
    with pytest.raises(DataError, match="a list of messages or a text"):
        ChatFormatter(tokenizer).prompt(None)  # type: ignore[arg-type]


#: As Qwen 2.5 writes tool calls, and answers of tools as the user's.
TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m.content }}\n</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{% if call.function is defined %}"
    "{% set call = call.function %}{% endif %}<tool_call>\n{\"name\": \"{{ call.name }}\", "
    "\"arguments\": {{ call.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_a_tool_call_is_learned_and_the_tools_answer_is_not(
    tokenizer: Any, content: str | None, arguments: Any
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    talk = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "Done."},
    ]
    formatter = ChatFormatter(tokenizer, chat_template=TOOLS)
    assert _trained(formatter, {"messages": talk}) == [CALL, "Done.<|im_end|>"]


def test_sharegpts_function_calls_are_tool_calls(tokenizer: Any) -> None:
    talk = [
        {"from": "human", "value": "Add."},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    formatter = ChatFormatter(tokenizer, chat_template=TOOLS)
    assert _trained(formatter, {"conversations": talk}) == [CALL, "Two.<|im_end|>"]
    # What is no JSON is what the assistant said.
    talk[1]["value"] = "add(1)"
    assert _trained(formatter, {"conversations": talk}) == ["add(1)<|im_end|>", "Two.<|im_end|>"]


def test_arrow_adds_no_arguments_to_tool_calls(tokenizer: Any, tmp_path: Any) -> None:
    """In an Arrow table every call has the arguments of all, null where it had none."""
    from datasets import Dataset

    def make(arguments: dict[str, int]) -> dict[str, Any]:
        call = {"function": {"name": "add", "arguments": arguments}}
        return {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}

    dataset = Dataset.from_list([make({"a": 1}), make({"b": 2})])
    assert dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "a": 1, "b": None,
    }  # fmt: skip
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    formatter = ChatFormatter(tokenizer, chat_template=TOOLS)
    for source in (dataset, tmp_path / "rows.parquet"):
        assert _trained(formatter, formatter.load(source)[0]) == [CALL]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("add", "tool_calls that are not a list of objects"),
        ([{"function": "add"}], "'function' is not an object"),
        ([{"function": {"name": "add", "arguments": "{a"}}], "arguments are not JSON"),
    ],
)
def test_bad_tool_calls_are_named(tokenizer: Any, calls: Any, message: str) -> None:
    row = {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    with pytest.raises(DataError, match=f"message 2 has .*{message}"):
        ChatFormatter(tokenizer).load([row])


def test_a_preview_reports_what_the_template_refuses(tokenizer: Any) -> None:
    rows = [{"messages": TALK[1:]}, {"messages": TALK[:2]}]
    with pytest.raises(DataError, match=r"row 1 \(index 0\): .*roles must alternate"):
        ChatFormatter(tokenizer, chat_template=MISTRAL).preview(rows)
    skipping = ChatFormatter(tokenizer, chat_template=MISTRAL, on_bad_rows="skip")
    text = skipping.preview(rows)
    assert "1 of 2 examples" in text
    assert "── example 2" in text
    assert skipping.describe(rows).rows == 1
    assert "1 rows (50.0%) left out because they cannot be formatted" in str(
        skipping.encode(rows, max_length=512).report
    )


def test_a_template_without_tools_is_not_trained_on_empty_turns(tokenizer: Any) -> None:
    call = {"function": {"name": "add", "arguments": {}}}
    row = {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(DataError, match="does not write the tool calls of message 2"):
        ChatFormatter(tokenizer).encode([row], max_length=512)


def test_a_role_that_is_never_learned_is_said(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ChatFormatter(tokenizer).load([{"messages": [{"role": "asistant", "content": "x"}, *TALK]}])
    assert "1 messages of a list of 1 have the role 'asistant'" in caplog.text
    assert "Did you mean 'assistant'" in caplog.text


def test_messages_of_a_csv_file_are_json_text(tokenizer: Any, tmp_path: Any) -> None:
    import csv

    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(TALK)]])
    assert ChatFormatter(tokenizer).load(path)[0]["messages"] == TALK


@pytest.mark.parametrize(
    ("template", "said"),
    [("qwen33", "Did you mean 'qwen3'"), (__file__, "It is a file"), (3, "must be text or a name")],
)
def test_a_name_that_is_none_is_not_taken_for_a_template(template, said):
    with pytest.raises(ConfigError, match=said):
        ChatFormatter(make_tokenizer("bytes"), chat_template=template)
