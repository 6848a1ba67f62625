"""What is said where rows or prompts are of another kind than asked for, and templates by name."""

import json

import pytest

from qlora_kit import AlpacaFormatter, ChatFormatter, generate_stream
from qlora_kit.data import plan_formatter, read_source
from qlora_kit.data.formatters.shipped_templates import list_chat_templates, read_chat_template
from qlora_kit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(adapted):
    return adapted.tokenizer


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ID": 1, "question": "a", "response": "b"}, "columns={'instruction': 'question'}"),
        ({"id": 1, "user_query": "a", "bot": "b"}, "columns={'instruction': 'user_query'}"),
        ({"id": 1, "stuff": "a"}, "columns={'instruction': 'stuff'}"),
        ({"id": 1, "instruction": "a", "final_answer": "b"}, "columns={'output': 'final_answer'}"),
        ({"messages": []}, "look like conversations: ChatFormatter(tokenizer)"),
        ({"prompt": "a", "completion": "b"}, "PromptCompletionFormatter(tokenizer)"),
        ({"prompt": [1], "completion": [2]}, "in two parts: ChatFormatter(tokenizer)"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "give the better one as the answer"),
    ],
)
def test_hints_name_columns_that_make_sense_and_the_fitting_formatter(tokenizer, row, said):
    with pytest.raises(DataError) as caught:
        AlpacaFormatter(tokenizer).load([row])
    assert said in str(caught.value)


def test_blanks_around_the_names_of_a_header_are_nothing(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction , output\nSay a., a\n", encoding="utf-8")
    rows = AlpacaFormatter(tokenizer).load(path)
    assert rows[0]["instruction"] == "Say a."
    assert read_source(path).columns == ["instruction", "output"]


def test_a_list_of_prompts_is_answered_with_the_right_call(adapted):
    with pytest.raises(ConfigError, match="generate_batch"):
        generate_stream(adapted, ["One?", "Two?"])


# -- templates by name ---------------------------------------------------------------------------


def test_a_base_model_without_a_template_gets_one_by_name_with_its_end(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    with pytest.raises(ConfigError, match="chat template"):
        ChatFormatter(bare)
    formatter = ChatFormatter(bare, chat_template="chatml")
    assert formatter.eos_token == "<|im_end|>"
    learned = [s for s in formatter.segments({"messages": talk}) if s.is_trained]
    assert "".join(segment.text for segment in learned) == "Yes<|im_end|>"
    assert str(formatter.prompt("Hi")).endswith("<|im_start|>assistant\n")
    again = ChatFormatter.from_spec(json.loads(json.dumps(formatter.template_spec())), bare)
    assert again.template_spec() == formatter.template_spec()


def test_a_template_whose_marks_are_no_tokens_is_refused_with_those_that_go(tokenizer):
    with pytest.raises(ConfigError, match=r"'llama3' writes .*no tokens for.*chatml"):
        ChatFormatter(tokenizer, chat_template="llama3")
    plan = plan_formatter(["messages"], template="chatml")
    assert plan.kind is ChatFormatter
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        plan_formatter(["messages"], template="qwen33")


def test_the_names_are_those_of_files():
    names = list_chat_templates()
    assert {"chatml", "llama3", "qwen3", "gemma", "phi3"} <= set(names)
    assert not any("training" in name or "_vl" in name for name in names)
    assert all(read_chat_template(name) for name in names)
    assert read_chat_template("nothing") is None
