"""Every template that TRL ships, against TRL's own masks: the same tokens learned, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from qlora_kit.errors import ConfigError, DataError

from .test_real_templates import _make

FOLDER = Path(trl.__file__).parent / "chat_templates"
#: TRL's training templates, whose markers say what it trains on, and the model's own template.
PAIRS = {
    path.stem: path.stem.removesuffix("_training")
    for path in sorted(FOLDER.glob("*_training.jinja"))
}
Q = {"role": "user", "content": "What is two and two?"}
A = {"role": "assistant", "content": "Four."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 34}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
ROWS: dict[str, dict[str, Any]] = {
    "single": {"messages": [Q, A]},
    "several": {
        "messages": [Q, A, {"role": "user", "content": "And five?"}, {**A, "content": "9"}]
    },
    "system": {"messages": [{"role": "system", "content": "Be brief."}, Q, A]},
    "tools": {
        "tools": [TOOL],
        "messages": [
            Q,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "content": "46"},
            {**A, "content": "It is 46."},
        ],
    },
    "reasoning": {"messages": [Q, {**A, "reasoning_content": "let me see"}]},
}


#: Their messages are lists of parts, since some may be pictures: text is refused by name.
WITH_PICTURES = ("idefics3", "llava_next", "smolvlm")


def _mask(formatter: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids and the mask as TRL takes them from transformers."""
    out = formatter.tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        chat_template=formatter.template.source,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(out["input_ids"]), list(out["assistant_masks"])


def _as_gptoss(message: dict[str, Any]) -> dict[str, Any]:
    return {("thinking" if key == "reasoning_content" else key): v for key, v in message.items()}


def _without_space(tokenizer: Any, ids: list[int]) -> str:
    """Text without white space: where a turn ends in a line break TRL trains it, here it is not."""
    return "".join(tokenizer.decode(ids).split())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_training_template_trains_what_it_trains_in_trl(name: str, kind: str) -> None:
    if PAIRS[name] in WITH_PICTURES:
        with pytest.raises(ConfigError, match=r"The chat template (leaves out|cannot render)"):
            _make(name)
        return
    formatter, row = _make(name), ROWS[kind]
    try:
        (example,) = formatter.encode([row], max_length=100_000).dataset
    except DataError as error:
        # What is refused has a reason: the template itself, or what it leaves out.
        reasons = ("refuses it", "leaves out", "does not write the tool calls")
        if not any(reason in str(error) for reason in reasons):
            raise
        return
    if name == "gptoss_training":
        # Here a thought is read under any key; TRL leaves it to the template, which reads one.
        row = {**row, "messages": [_as_gptoss(message) for message in row["messages"]]}
    ids, mask = _mask(formatter, row)
    tokenizer = formatter.tokenizer
    assert _without_space(tokenizer, example["input_ids"]) == _without_space(tokenizer, ids)
    ours = [label for label in example["labels"] if label != -100]
    theirs = [index for index, is_trained in zip(ids, mask, strict=True) if is_trained]
    end = formatter.eos_token_id
    said, expected = (_without_space(tokenizer, one) for one in (ours, theirs))
    # The token that ends a turn is learned here also where TRL's marker closes before it.
    if said != expected:
        name_of_end = tokenizer.convert_ids_to_tokens(end)
        assert said.replace(name_of_end, "") == expected.replace(name_of_end, "")
        assert ours[-1] == end


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "qwen2_5"])
def test_a_conversation_in_two_parts_trains_what_it_trains_in_trl(name: str) -> None:
    formatter = _make(name)
    prompt = [Q, A, {"role": "user", "content": "And five?"}]
    row = {"prompt": prompt, "completion": [{**A, "content": "9"}]}
    # As TRL's trainer does: what the whole has beyond the prompt is the completion.
    template = {"chat_template": formatter.template.source, "tokenize": True, "return_dict": False}
    render = formatter.tokenizer.apply_chat_template
    start = render(prompt, add_generation_prompt=True, **template)
    whole = render(prompt + row["completion"], **template)
    assert whole[: len(start)] == start
    (example,) = formatter.encode([row], max_length=1000).dataset
    learned = [label for label in example["labels"] if label != -100]
    assert example["input_ids"] == whole[: len(example["input_ids"])]
    assert learned == whole[len(start) : len(example["input_ids"])]
    assert not formatter.tokenizer.decode(whole[len(example["input_ids"]) :]).strip()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.jinja")))
def test_a_template_loses_nothing_in_silence(name: str) -> None:
    try:
        formatter = _make(name)
    except ConfigError as error:
        pytest.skip(str(error))
    for kind, row in ROWS.items():
        try:
            (example,) = formatter.encode([row], max_length=100_000).dataset
        except DataError:
            continue
        text = formatter.tokenizer.decode(example["input_ids"])
        learned = formatter.tokenizer.decode([i for i in example["labels"] if i != -100])
        for message in row["messages"]:
            assert message["content"] in text, (kind, message)
            if message["role"] == "assistant":
                assert message["content"] in learned, (kind, message)
                assert message.get("reasoning_content", "") in learned, (kind, message)
            elif message["role"] == "user":
                assert message["content"] not in learned, (kind, message)
        for call in row["messages"][1].get("tool_calls", ()):
            assert call["function"]["name"] in learned
            assert "12" in learned
