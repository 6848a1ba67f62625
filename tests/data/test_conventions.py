"""The table of conventions in docs/data.md, cell by cell, on rows as their own pages show them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_kit.data import formatter_from_spec, plan_formatter, read_source
from qlora_kit.errors import QloraKitError

from .test_everything_is_learned import _decode_runs
from .test_real_templates import _make

TOOL = {"name": "get_weather", "description": "Weather of a city.", "parameters": {}}
TOOLS = [{"type": "function", "function": TOOL}]
ARGUMENTS = '{"city": "Jinan"}'
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
USER = {"role": "user", "content": "How is it in Jinan?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
ALPACA = {"instruction": "Name it.", "input": "", "output": "Ann."}
END = "<|im_end|>"


class Cell(NamedTuple):
    """A row, what its example shows, and the stretches that are learned; or why it is refused."""

    row: dict[str, Any]
    shown: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    refused: str = ""


CELLS = {
    "OpenAI": {
        "tools": Cell({"tools": TOOLS, "messages": [USER, ANSWER]}, ("Weather of a city.",)),
        "tool_calls": Cell(
            {
                "tools": TOOLS,
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "25 degrees"},
                    ANSWER,
                ],
            },
            ("25 degrees",),
            (f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>{END}',
             f"Sunny.{END}"),
        ),
        "weight": Cell(
            {"messages": [USER, {**ANSWER, "content": "Wet.", "weight": 0}, USER,
                          {**ANSWER, "weight": 1}]},
            ("Wet.",), (f"Sunny.{END}",),
        ),
        "developer": Cell(
            {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
            ("system\nBe brief.",), (f"Sunny.{END}",),
        ),
        "functions": Cell({"functions": [TOOL], "messages": [USER, ANSWER]}, ("Weather of a",)),
        "function_call": Cell(
            {
                "functions": [TOOL],
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": CALL["function"]},
                    {"role": "function", "name": "get_weather", "content": "25 degrees"},
                    ANSWER,
                ],
            },
            ("25 degrees", ARGUMENTS),
        ),
        "other weights": Cell({"messages": [USER, {**ANSWER, "weight": 2}]}, refused="weight of 2"),
        "refusal": Cell({"messages": [USER, {**ANSWER, "refusal": "No."}]}, refused="'refusal'"),
        "pictures and sound": Cell(
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "x.png"}},
            ]}, ANSWER]},
            refused="message 1 has a content",
        ),
    },
    "ShareGPT": {
        "from": Cell(
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            ("user\nHi",), (f"Yo{END}",),
        ),
        "function_call": Cell(
            {
                "tools": json.dumps([TOOL]),
                "conversations": [
                    {"from": "human", "value": "Weather?"},
                    {"from": "function_call",
                     "value": f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'},
                    {"from": "observation", "value": "25 degrees"},
                    {"from": "gpt", "value": "Sunny."},
                ],
            },
            ("25 degrees", "Weather of a city."),
            (f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>{END}',
             f"Sunny.{END}"),
        ),
        "system": Cell(
            {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"},
                                                      {"from": "gpt", "value": "Yo"}]},
            ("system\nBe brief.",), (f"Yo{END}",),
        ),
        "second system": Cell(
            {"system": "Be brief.", "conversations": [
                {"from": "system", "value": "Be long."}, {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yo"}]},
            refused="another system message",
        ),
    },
    "Alpaca": {
        "input": Cell({**ALPACA, "input": "A or B"}, ("### Input:\nA or B",), (f"Ann.{END}",)),
        "no input": Cell(ALPACA, ("### Instruction:\nName it.\n\n### Response:",), (f"Ann.{END}",)),
    },
    "LLaMA-Factory": {
        "system": Cell({**ALPACA, "system": "Be brief."}, ("Be brief.\n\n###",), (f"Ann.{END}",)),
        "history": Cell(
            {**ALPACA, "history": [["Who came first?", "Bob."]]},
            ("Who came first?",), (f"Bob.{END}", f"Ann.{END}"),
        ),
        **{
            name: Cell({**ALPACA, name: ["x"]}, refused=f"'{name}'")
            for name in ("images", "videos", "audios", "chosen", "rejected")
        },
    },
    "axolotl": {
        "train": Cell(
            {"messages": [USER, {**ANSWER, "content": "Wet.", "train": False}, USER,
                          {**ANSWER, "train": True}]},
            ("Wet.",), (f"Sunny.{END}",),
        ),
        "training": Cell(
            {"conversations": [
                {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No", "training": False},
                {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            ("No",), (f"Yo{END}",),
        ),
        "train_detail": Cell(
            {"messages": [USER, {**ANSWER, "train_detail": [
                {"begin_offset": 0, "end_offset": 2, "train": False}]}]},
            refused="'train_detail'",
        ),
    },
    "Dolly": {
        "context": Cell(
            {"instruction": "Who?", "context": "Ann won.", "response": "Ann.", "category": "qa"},
            ("### Input:\nAnn won.",), (f"Ann.{END}",),
        ),
    },
    "TRL": {
        "messages": Cell({"messages": [USER, ANSWER]}, (), (f"Sunny.{END}",)),
        "tools": Cell({"messages": [USER, ANSWER], "tools": TOOLS}, ("Weather of a city.",)),
        "prompt": Cell({"prompt": "2+2=", "completion": "4"}, ("2+2=",), (f"4{END}",)),
        "text": Cell({"text": "Q: 2+2 A: 4"}, (), (f": 2+2 A: 4{END}",)),
        "chat_template_kwargs": Cell(
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
            ("<think>\n\n</think>",),
        ),
        "conversations in two parts": Cell(
            {"prompt": [USER, {**ANSWER, "content": "Wet."}, USER], "completion": [ANSWER]},
            ("Wet.",), (f"Sunny.{END}",),
        ),
        "pairs": Cell(
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, refused="the better one",
        ),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    formatter = _make("qwen3")
    formatter.tokenizer.chat_template = formatter.template.source
    return formatter.tokenizer


@pytest.mark.parametrize(
    ("convention", "name"), [(c, name) for c, cells in CELLS.items() for name in cells]
)
def test_a_row_of_the_convention(convention: str, name: str, tokenizer: Any) -> None:
    cell = CELLS[convention][name]

    def encode() -> Any:
        formatter = plan_formatter(read_source([cell.row])).make(tokenizer)
        if hasattr(formatter, "response_only") and "instruction" in cell.row:
            spec = formatter.template_spec() | {"response_only": True}
            formatter = formatter_from_spec(spec, tokenizer)
        return formatter.encode(formatter.load([cell.row]), max_length=10_000).dataset[0]

    if cell.refused:
        with pytest.raises(QloraKitError, match=re.escape(cell.refused)):
            encode()
        return
    example = encode()
    text = tokenizer.decode(example["input_ids"])
    learned = tuple(_decode_runs(tokenizer, example["labels"]))
    assert all(words in text for words in cell.shown), text
    assert (
        not cell.learned
        or tuple(run.replace("<think>\n\n</think>\n\n", "") for run in learned) == cell.learned
    )


def test_the_table_of_the_page_names_each(tokenizer: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.split("| convention |")[1].split("\n\n")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert set(rows) == set(CELLS)
    tried = {
        c: json.dumps([*cells, *(cell.row for cell in cells.values())])
        for c, cells in CELLS.items()
    }
    for convention, line in rows.items():
        for name in re.findall(r"`(\w+)`", line):
            assert name in tried[convention], f"{convention}: {name} is in the table and not here"
