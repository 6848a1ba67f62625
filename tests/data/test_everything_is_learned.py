"""Every part of a row is in its example, or is named: conventions of six tools."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from qlora_kit.data import AlpacaFormatter, ChatFormatter, FormatterBase, Segment
from qlora_kit.errors import ConfigError, DataError

from .conftest import make_tokenizer
from .test_real_templates import _decode_runs, _make

Q = {"role": "user", "content": "What is two and two?"}
A = {"role": "assistant", "content": "Four."}
CALL = {"name": "add", "arguments": '{"a": 12, "b": 34}'}


def _look(formatter: Any, row: Any) -> tuple[str, list[str]]:
    """The text of a row's example, and the stretches that carry loss."""
    (example,) = formatter.encode([row], max_length=100_000).dataset
    text = formatter.tokenizer.decode(example["input_ids"])
    return text, _decode_runs(formatter.tokenizer, example["labels"])


# -- OpenAI ------------------------------------------------------------------------------------


def test_openai_weight_0_is_context_and_not_learned(tokenizer: Any) -> None:
    row = {"messages": [Q, {**A, "content": "Five.", "weight": 0}, Q, {**A, "weight": 1}]}
    text, learned = _look(ChatFormatter(tokenizer), row)
    assert "Five." in text
    assert learned == ["Four.<|im_end|>"]
    # Also where prompts are learned too.
    _, learned = _look(ChatFormatter(tokenizer, response_only=False), row)
    assert "Five." not in "".join(learned)
    assert "What is two" in learned[-1]


def test_a_weight_of_0_counts_for_every_role_where_everything_is_learned(tokenizer: Any) -> None:
    secret = {"role": "user", "content": "My pin is 4711.", "weight": 0}
    rows = [[secret, A, Q, A], [Q, A, {**secret, "weight": 1, "train": False}, A]]
    for row in rows:
        text, learned = _look(ChatFormatter(tokenizer, response_only=False), {"messages": row})
        assert "My pin is 4711." in text
        assert "4711" not in "".join(learned)
        assert "What is two and two?" in "".join(learned)
        # Only the assistant's words carry loss anyway.
        assert _look(ChatFormatter(tokenizer), {"messages": row})[1] == ["Four.<|im_end|>"] * 2


def test_words_that_stand_twice_cannot_be_left_out(tokenizer: Any) -> None:
    row = {"messages": [{**Q, "content": "user", "weight": 0}, A]}
    with pytest.raises(DataError, match=r"response_only=True"):
        _look(ChatFormatter(tokenizer, response_only=False), row)


def test_other_roles_that_ask_to_be_learned_are_told_of(tokenizer: Any, caplog: Any) -> None:
    row = {"messages": [{**Q, "train": True}, A, {**Q, "weight": 1}, {**A, "weight": 1}]}
    ChatFormatter(tokenizer, response_only=False).load([row])
    assert not caplog.text
    ChatFormatter(tokenizer).load([row])
    assert "2 messages of a list of 1 ask to be learned" in caplog.text


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"weight": 0.5}, "weight of 0.5"),
        ({"train": "no"}, "neither true nor false"),
        ({"train_detail": [{"begin_offset": 0}]}, "has 'train_detail'"),
        ({"refusal": "I cannot."}, "has 'refusal'"),
        ({"reasoning_content": 7}, "'reasoning_content' that is not text but int"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tokenizer: Any, extra: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ChatFormatter(tokenizer).load([{"messages": [Q, {**A, **extra}]}])


def test_openai_functions_and_function_calls_are_tools() -> None:
    row = {
        "functions": [{"name": "add", "description": "Adds two.", "parameters": {}}],
        "messages": [
            Q,
            {"role": "assistant", "content": None, "function_call": CALL},
            {"role": "function", "name": "add", "content": "46"},
            A,
        ],
    }
    text, learned = _look(_make("qwen3"), row)
    assert "Adds two." in text
    assert '"a": 12, "b": 34' in learned[0]
    assert "46" in text
    assert "46" not in "".join(learned)


def test_a_developer_is_a_system_where_the_template_knows_none(caplog: Any) -> None:
    row = {"messages": [{"role": "developer", "content": "Be brief."}, Q, A]}
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        text, _ = _look(_make("qwen2_5"), row)
    assert "<|im_start|>system\nBe brief." in text
    assert "1 messages of a list of 1 have the role 'developer'" in caplog.text


@pytest.mark.parametrize(
    ("name", "message", "said"),
    [
        ("phi3", {"role": "tool", "content": "It rains."}, "message 2, whose role is 'tool'"),
        ("phi3_5", {"role": "tool", "content": "It rains."}, "message 2, whose role is 'tool'"),
    ],
)
def test_a_message_that_the_template_drops_refuses_the_row(
    name: str, message: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        _make(name).encode([{"messages": [Q, message, Q, A]}], max_length=10_000)


def test_a_dropped_message_is_noticed_where_its_words_stand_elsewhere_too(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    formatter = ChatFormatter(tokenizer, chat_template=template)
    row = [Q, {"role": "tool", "content": "Four."}, A]
    with pytest.raises(DataError, match="message 2, whose role is 'tool'"):
        formatter.encode([{"messages": row}], max_length=10_000)


# -- reasoning ---------------------------------------------------------------------------------

THOUGHTS = [
    Q,
    {**A, "reasoning_content": "first thought"},
    {"role": "user", "content": "And five?"},
    {"role": "assistant", "content": "Nine.", "reasoning_content": "second thought"},
]
INLINE = [
    {"role": m["role"], "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
    if "reasoning_content" in m
    else m
    for m in THOUGHTS
]


@pytest.mark.parametrize("messages", [THOUGHTS, INLINE], ids=["key", "inline"])
def test_qwen3_forgets_earlier_thoughts_and_trls_template_keeps_them(messages: Any) -> None:
    tokenizer = (formatter := _make("qwen3")).tokenizer
    tokenizer.chat_template = formatter.template.source
    formatter = ChatFormatter(tokenizer)
    with pytest.raises(DataError, match=r"reasoning of message 2 .*chat_template='training'"):
        formatter.encode([{"messages": messages}], max_length=10_000)
    _, learned = _look(formatter, {"messages": messages[2:]})
    assert learned == ["<think>\nsecond thought\n</think>\n\nNine.<|im_end|>"]
    training = ChatFormatter(tokenizer, chat_template="training")
    _, learned = _look(training, {"messages": messages})
    assert "first thought" in learned[0]
    assert "second thought" in learned[1]
    spec = training.template_spec()
    assert spec["name"] == "training"
    again = ChatFormatter.from_spec(json.loads(json.dumps(spec)), tokenizer)
    assert again.fingerprint == training.fingerprint


def test_r1_forgets_every_thought_and_trls_template_keeps_them() -> None:
    row = {"messages": [Q, {**A, "content": "<think>hm</think>4"}]}
    formatter = _make("deepseek_r1_distill")
    with pytest.raises(DataError, match="reasoning of message 2"):
        formatter.encode([row], max_length=10_000)
    _, learned = _look(_make("deepseek_r1_distill_training"), row)
    assert "<think>hm</think>4" in learned[0]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3"])
def test_a_thought_without_a_place_refuses_the_row(name: str) -> None:
    with pytest.raises(DataError, match="leaves out the reasoning of message 2"):
        _make(name).encode([{"messages": THOUGHTS[:2]}], max_length=10_000)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_stands_under_any_key(key: str) -> None:
    row = {"messages": [Q, {**A, key: "let me see"}]}
    for name in ("qwen3", "gptoss"):
        assert "let me see" in "".join(_look(_make(name), row)[1])


def test_added_think_tokens_are_those_of_apply_chat_template() -> None:
    formatter = _make("qwen3")
    tokenizer, template = formatter.tokenizer, formatter.template.source
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    formatter = ChatFormatter(tokenizer, chat_template=template)
    messages = [Q, {**A, "content": "<think>\nhm\n</think>\n\nFour <|im_end|>"}]
    (example,) = formatter.encode([{"messages": [*messages]}], max_length=10_000).dataset
    ids = example["input_ids"]
    thought = tokenizer.convert_tokens_to_ids("<think>")
    assert ids.count(thought) == 1
    # The name of another token in the same answer is text, as ever.
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    plain = [Q, {**A, "content": "<think>\nhm\n</think>\n\nFour"}]
    (example,) = formatter.encode([{"messages": plain}], max_length=10_000).dataset
    own = tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False).rstrip()
    assert example["input_ids"] == tokenizer(own, add_special_tokens=False)["input_ids"]


def test_variables_of_a_row_reach_the_template(caplog: Any) -> None:
    variables = {"enable_thinking": False, "mood": "glad"}
    rows = [
        {"messages": [Q, A], "chat_template_kwargs": variables},
        {"messages": [Q, A], "chat_template_kwargs": json.dumps({"mood": "sad"})},
    ]
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ mood }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {{ mood }}\n{% endif %}"
    )
    formatter = ChatFormatter(make_tokenizer("bytes"), chat_template=template)
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        examples = formatter.encode(rows, max_length=10_000).dataset
    for word, example in zip(("glad", "sad"), examples, strict=True):
        assert word in formatter.tokenizer.decode(example["input_ids"])
    assert "chat_template_kwargs['enable_thinking'] (1, such as False)" in caplog.text


# -- ShareGPT and axolotl ----------------------------------------------------------------------


def test_sharegpt_system_beside_a_conversation_comes_first(tokenizer: Any) -> None:
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
    }
    text, learned = _look(ChatFormatter(tokenizer), row)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert learned == ["Yo<|im_end|>"]
    row["conversations"].insert(0, {"from": "system", "value": "Be long."})  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="'system' column and another system message"):
        ChatFormatter(tokenizer).load([row])


def test_axolotl_train_false_is_context_and_not_learned(tokenizer: Any) -> None:
    row = {"messages": [Q, {**A, "content": "Five.", "train": False}, Q, {**A, "train": True}]}
    text, learned = _look(ChatFormatter(tokenizer), row)
    assert "Five." in text
    assert learned == ["Four.<|im_end|>"]
    described = str(ChatFormatter(tokenizer).describe([row]))
    assert "1 (100.0%) of the rows exclude a turn" in described


# -- Alpaca, LLaMA-Factory, Dolly --------------------------------------------------------------

ROW = {"instruction": "Add five.", "input": "", "output": "Nine."}


def test_llama_factory_system_and_history(tokenizer: Any) -> None:
    row = {**ROW, "system": "You {add}.", "history": [["Two and two?", "Four."]]}
    formatter = AlpacaFormatter(tokenizer, response_only=True)
    text, learned = _look(formatter, row)
    assert text.startswith("You {add}.\n\n### Instruction:\nTwo and two?\n\n### Response:\nFour.")
    assert "Below is" not in text
    assert text.count("You {add}.") == 1
    assert learned == ["Four.<|im_end|>", "Nine.<|im_end|>"]
    # JSON text, as a CSV file has it; a template without a place for a system text.
    formatter = AlpacaFormatter(tokenizer, "Q: {instruction} A: {output}", response_only=True)
    text, _ = _look(formatter, {**row, "history": json.dumps(row["history"])})
    assert (
        text
        == "You {add}.\n\nQ: Two and two? A: Four.<|im_end|>\n\nQ: Add five. A: Nine.<|im_end|>"
    )


@pytest.mark.parametrize("history", ["yes", [["a"]], [["a", None]], {"a": "b"}])
def test_a_history_of_another_shape_is_refused(tokenizer: Any, history: Any) -> None:
    with pytest.raises(DataError, match=r"'history' (is|has)"):
        AlpacaFormatter(tokenizer).load([{**ROW, "history": history}])


def test_dolly_context_is_the_input(tokenizer: Any, caplog: Any) -> None:
    row = {
        "instruction": "Who?", "context": "Ann won.", "response": "Ann.", "category": "closed_qa",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        text, _ = _look(AlpacaFormatter(tokenizer), row)
        named = AlpacaFormatter(tokenizer, columns={"output": "response"})
        assert _look(named, row)[0] == text
    assert "### Input:\nAnn won." in text
    assert "Not used of a list of 1: the column 'category' (1, such as 'closed_qa')." in caplog.text


# -- columns and keys of no known meaning ------------------------------------------------------


def test_what_is_not_used_is_named_by_load_describe_and_preview(
    tokenizer: Any, caplog: Any
) -> None:
    rows = [
        {"messages": [{**Q, "stamp": "noon"}, A], "source": f"s{n}", "empty": None}
        for n in range(3)
    ]
    formatter = ChatFormatter(tokenizer)
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        loaded = formatter.load(rows)
    expected = ["the column 'source' (3, such as 's0')", "the key 'stamp' of messages (3, such as"]
    for phrase in expected:
        assert phrase in caplog.text
        assert phrase in str(formatter.describe(loaded))
        assert phrase in formatter.preview(loaded, n=1)
    assert "empty" not in caplog.text


@pytest.mark.parametrize("name", ["images", "chosen", "rejected"])
def test_columns_whose_meaning_would_be_lost_are_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"have a column '{name}'"):
        AlpacaFormatter(tokenizer).load([{**ROW, name: "x"}])


def test_nothing_is_claimed_about_columns_that_a_strangers_code_reads(
    tokenizer: Any, caplog: Any
) -> None:
    class Own(FormatterBase):
        name = "own"
        roles = ("a", "b")

        @classmethod
        def read_row(cls, row: Any, columns: Any = None) -> Any:
            return {"a": row["a"] + row["c"], "b": row["b"]}, []

        def segments(self, row: Any) -> Any:
            return [Segment(row["a"]), Segment(row["b"], is_trained=True)]

    Own(tokenizer).load([{"a": "x", "b": "y", "c": "z"}])
    assert "Not used" not in caplog.text


# -- special tokens ----------------------------------------------------------------------------


def test_added_tokens_are_text_or_tokens_and_training_says_so(caplog: Any) -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    row = {**ROW, "output": "<tool>add<|im_end|>"}
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        (text,) = AlpacaFormatter(tokenizer).encode([row], max_length=999).dataset
    assert tool not in text["input_ids"]
    assert "1 of 1 rows spell out '<tool>', '<|im_end|>', which stays text" in caplog.text
    formatter = AlpacaFormatter(tokenizer, special_tokens="tokens")
    (example,) = formatter.encode([row], max_length=999).dataset
    assert example["labels"].count(tool) == 1
    assert example["input_ids"].count(tokenizer.eos_token_id) == 1
    again = AlpacaFormatter.from_spec(formatter.template_spec(), tokenizer)
    assert again.fingerprint == formatter.fingerprint
    assert tool in formatter.prompt("Use <tool>").token_ids
    chat = ChatFormatter(tokenizer, special_tokens="tokens")
    (example,) = chat.encode(
        [{"messages": [Q, {**A, "content": "<tool>x"}]}], max_length=999
    ).dataset
    assert example["labels"].count(tool) == 1
    with pytest.raises(ConfigError, match="special_tokens must be 'text' or 'tokens'"):
        AlpacaFormatter(tokenizer, special_tokens="ids")  # type: ignore[arg-type]


# -- the beginning -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "phi3"])
def test_a_conversation_may_start_with_the_assistant(name: str) -> None:
    opening = {"role": "assistant", "content": "How can I help?"}
    text, learned = _look(_make(name), {"messages": [opening, Q, A]})
    assert learned[0].startswith("How can I help?")
    assert "How can I help?" in text


def test_a_table_with_arrays_is_read_like_its_file(tokenizer: Any, tmp_path: Any) -> None:
    pd = pytest.importorskip("pandas")
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"messages": [[Q, A]]}).to_parquet(path)
    formatter = ChatFormatter(tokenizer)
    assert list(formatter.load(pd.read_parquet(path))) == list(formatter.load(path))


@pytest.mark.parametrize("value", ["no", "false", 0, 1])
def test_response_only_is_true_or_false(tokenizer: Any, value: Any) -> None:
    for kind in (AlpacaFormatter, ChatFormatter):
        with pytest.raises(ConfigError, match="response_only must be True or False"):
            kind(tokenizer, response_only=value)
