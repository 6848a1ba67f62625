"""Chat templates as models ship them, from the copies that TRL carries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data import ChatFormatter

from .conftest import make_tokenizer

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes."},
]
#: What carries loss in each answer, and the token that the model is to stop at.
EXPECTED = {
    "cohere": (
        ["Hello<|END_OF_TURN_TOKEN|>", "Yes.<|END_OF_TURN_TOKEN|>"], "<|END_OF_TURN_TOKEN|>",
    ),
    "cohere2": (
        ["Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseekv3": (
        ["Hello<｜end▁of▁sentence｜>", "Yes.<｜end▁of▁sentence｜>"], "<｜end▁of▁sentence｜>",
    ),
    "gemma": (["Hello<end_of_turn>", "Yes.<end_of_turn>"], "<end_of_turn>"),
    "gemma3": (["Hello<end_of_turn>", "Yes.<end_of_turn>"], "<end_of_turn>"),
    # Ends the answer that it is to write otherwise than the answers that it has given.
    "gptoss": (
        ["<|channel|>final<|message|>Hello<|end|>", "<|channel|>final<|message|>Yes.<|return|>"],
        "<|return|>",
    ),
    "lfm2": (["Hello<|im_end|>", "Yes.<|im_end|>"], "<|im_end|>"),
    "llama3": (["Hello<|eot_id|>", "Yes.<|eot_id|>"], "<|eot_id|>"),
    "llama3_2": (["Hello<|eot_id|>", "Yes.<|eot_id|>"], "<|eot_id|>"),
    "nemotron_3_nano": (
        ["<think></think>Hello<|im_end|>", "<think></think>Yes.<|im_end|>"], "<|im_end|>",
    ),
    "phi3": (["Hello<|end|>", "Yes.<|end|>"], "<|end|>"),
    "qwen2_5": (["Hello<|im_end|>", "Yes.<|im_end|>"], "<|im_end|>"),
    # Shows an empty thought in the last answer only, and opens it in the prompt from 3.5 on.
    "qwen3": (["Hello<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"], "<|im_end|>"),
    "qwen3_5_think": (["Hello<|im_end|>", "\n</think>\n\nYes.<|im_end|>"], "<|im_end|>"),
    "qwen3_instruct_2507": (["Hello<|im_end|>", "Yes.<|im_end|>"], "<|im_end|>"),
    # With generation markers, which say themselves what the assistant wrote.
    "cohere2_training": (
        ["Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>",
    ),
    "diffusion_gemma_training": (["Hello<turn|>", "Yes.<turn|>"], "<turn|>"),
    "llama3_training": (["Hello<|eot_id|>", "Yes.<|eot_id|>"], "<|eot_id|>"),
    "qwen3_training": (
        ["<think>\n\n</think>\n\nHello<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"],
        "<|im_end|>",
    ),
}  # fmt: skip
#: Their prompts open a thought, or none, where their conversations do otherwise.
OTHER_THOUGHTS = ("deepseekv3", "nemotron_3_nano", "qwen3_training")
_SPECIAL = re.compile(r"<[|｜][^<>{}'\"]+?[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>")


def _make(name: str) -> ChatFormatter:
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"TRL {trl.__version__} has no copy of {name}'s template")
    template = path.read_text(encoding="utf-8")
    tokenizer = make_tokenizer("bytes")
    specials = sorted({*_SPECIAL.findall(template), "<|im_start|>", "<|im_end|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    if "bos_token" in template:
        tokenizer.bos_token = "<|bos|>"
    return ChatFormatter(tokenizer, chat_template=template)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_assistants_words_and_their_ends_carry_loss(name: str) -> None:
    formatter = _make(name)
    runs, end = EXPECTED[name]
    (example,) = formatter.encode([{"messages": TALK}], max_length=100_000).dataset
    assert formatter.eos_token == end
    assert _decode_runs(formatter.tokenizer, example["labels"]) == runs
    # The example is the template's text to the letter, up to white space at its end.
    text = formatter.tokenizer.decode(example["input_ids"])
    rendered = formatter.tokenizer.apply_chat_template(
        TALK, chat_template=formatter.template.source, tokenize=False
    )
    assert text.rstrip() == rendered.rstrip()
    prompt = formatter.prompt(TALK[:3])
    if name not in OTHER_THOUGHTS:
        assert example["input_ids"][: len(prompt.token_ids)] == prompt.token_ids


def _decode_runs(tokenizer: Any, labels: list[int]) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_the_end_of_another_message_is_not_taken_for_a_turns_own() -> None:
    """gpt-oss ends tool calls with a third token, and the tool's answer with the first."""
    from qlora_kit.errors import DataError

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    with pytest.raises(DataError, match="does not say where message 2 ends"):
        _make("gptoss").encode([{"messages": talk}], max_length=100_000)
    formatter = _make("qwen3")
    (example,) = formatter.encode([{"messages": talk}], max_length=100_000).dataset
    first, last = _decode_runs(formatter.tokenizer, example["labels"])
    assert first == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert last.endswith("Two.<|im_end|>")
