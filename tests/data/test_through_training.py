"""What the data package promises, seen through ``train_sft`` and both native training paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import randomize
from qlora_kit import attach_lora, generate_stream, load_quantized, train_sft
from qlora_kit.data import (
    AlpacaFormatter,
    ChatFormatter,
    Formatter,
    FormatterBase,
    Prompt,
    Segment,
    pack_examples,
    take_tokenized,
)
from qlora_kit.errors import DataError

ROWS = [
    {"instruction": "Say " * (1 + n % 3), "input": "", "output": "hello world " * (1 + n * 5 % 7)}
    for n in range(8)
]
TEMPLATE = "{instruction}{input}|{output}"
#: One step of plain gradient descent, so that the adapter shows the gradient itself.
STEP = {
    "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
    "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.0, "save_strategy": "no",
    "disable_tqdm": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip
#: Sums of float32 in another order, against the largest entry of the gradient.
TOLERANCE = 1e-3 if torch.cuda.is_available() else 2e-4
PLANS = {"fast": {"compile": False}, "trl": False}


@pytest.fixture
def make_model(tiny_llama: Path, tiny_qwen3: Path) -> Any:
    def make(kind: str = "llama", dtype: str = "float32") -> Any:
        folder = {"llama": tiny_llama, "qwen3": tiny_qwen3}[kind]
        return randomize(attach_lora(load_quantized(folder, 256, dtype, False), r=4))

    return make


@pytest.fixture(params=["fast", "trl"])
def plan(request: pytest.FixtureRequest) -> Any:
    """The two ways in which the native engine computes a step."""
    return PLANS[request.param]


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu() for n, p in model.model.named_parameters() if p.requires_grad}


def _step(model: Any, rows: Any, folder: Path, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    result = train_sft(model, rows, output_dir=folder, **{**STEP, **arguments})
    return result, _weights(model)


def _assert_identical(
    first: tuple[Any, dict[str, Any]], second: tuple[Any, dict[str, Any]]
) -> None:
    """The same step to the bit; on a GPU, whose sums may change their order, nearly so."""
    tolerance = 1e-6 if torch.cuda.is_available() else 0.0
    assert first[0].losses == pytest.approx(second[0].losses, rel=tolerance, abs=0)
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], rtol=0, atol=tolerance, msg=name)


def _compute_loss(model: Any, dataset: Any) -> tuple[float, int]:
    """The mean over trained tokens, one example at a time, without a trainer."""
    total, count = 0.0, 0
    device = next(model.model.parameters()).device
    for row in dataset:
        ids = torch.tensor([row["input_ids"]], device=device)
        with torch.no_grad():
            logits = model.model(input_ids=ids).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:], device=device)
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count, count


LAYOUTS: dict[str, dict[str, Any]] = {
    "2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "8 x 1": {},
    "padding-free 2 x 4": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "padding_free": True,
    },
    "packed": {"packing": True, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("response_only", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_step_is_the_mean_over_all_trained_tokens_in_every_layout(
    make_model: Any, kind: str, response_only: bool, tmp_path: Path
) -> None:
    model = make_model(kind)
    formatter = AlpacaFormatter(model.tokenizer, TEMPLATE, response_only=response_only)
    rows = formatter.load(ROWS)
    dataset = formatter.encode(rows, max_length=256).dataset
    loss, trained = _compute_loss(model, dataset)
    assert 1 < len(pack_examples(dataset, 128)) <= 4, "the packed step takes all rows"
    start = _weights(make_model(kind))
    reference: dict[str, Any] | None = None
    for plan_name, plan in PLANS.items():
        for name, layout in LAYOUTS.items():
            result, weights = _step(
                make_model(kind), rows, tmp_path, plan=plan, max_length=128, **layout
            )
            case = f"{plan_name}, {name}"
            assert result.losses[0] == pytest.approx(loss, rel=2e-6), case
            assert result.trained_tokens == trained, case
            assert (result.plan == "TRL and peft") is (plan_name == "trl"), case
            reference = reference or weights
            for parameter, value in reference.items():
                moved = (value - start[parameter]).abs().max().item()
                assert moved > 0
                difference = (weights[parameter] - value).abs().max().item()
                assert difference <= TOLERANCE * moved, (case, parameter)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_variable_length_kernels_make_the_same_step(
    make_model: Any, kind: str, tmp_path: Path
) -> None:
    """In bfloat16, where FlashAttention's kernels run, to the rounding of bfloat16."""
    formatter = AlpacaFormatter(make_model(kind).tokenizer, TEMPLATE, response_only=True)
    loss, _ = _compute_loss(make_model(kind), formatter.encode(ROWS, max_length=128).dataset)
    start = _weights(make_model(kind, "bfloat16"))
    reference = None
    for name, layout in LAYOUTS.items():
        result, weights = _step(
            make_model(kind, "bfloat16"), formatter.load(ROWS), tmp_path, plan=PLANS["fast"],
            max_length=128, **layout,
        )  # fmt: skip
        assert result.losses[0] == pytest.approx(loss, rel=1e-2), name
        reference = reference or weights
        for parameter, value in reference.items():
            moved = (value - start[parameter]).abs().max().item()
            difference = (weights[parameter] - value).abs().max().item()
            assert difference <= 0.1 * moved, (name, parameter)


def _packed_pair(first: list[int], *, are_apart: bool = True) -> Any:
    """A row of two examples, of which only the second is learned."""
    from datasets import Dataset

    second = [(7 * i) % 300 + 5 for i in range(20)]
    row = {
        "input_ids": [*first, *second],
        "labels": [-100] * (len(first) + 5) + second[5:],
        "seq_lengths": [len(first), len(second)],
    }
    if not are_apart:
        del row["seq_lengths"]
    return Dataset.from_list([row])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_packed_neighbour_changes_no_bit_of_the_step(
    make_model: Any, kind: str, plan: Any, tmp_path: Path
) -> None:
    one, other = [5, 9, 13, 17, 21, 25, 29], [300, 200, 100, 50, 25, 12, 6]
    _assert_identical(
        _step(make_model(kind), _packed_pair(one), tmp_path, plan=plan),
        _step(make_model(kind), _packed_pair(other), tmp_path, plan=plan),
    )
    # The check sees a leak: as one example the two do see each other.
    leaking = [
        _step(make_model(kind), _packed_pair(tokens, are_apart=False), tmp_path, plan=plan)[0]
        for tokens in (one, other)
    ]
    assert leaking[0].losses != pytest.approx(leaking[1].losses, rel=1e-4)


def test_rows_packed_beforehand_train_as_packing_does(
    make_model: Any, plan: Any, tmp_path: Path
) -> None:
    model = make_model()
    formatter = AlpacaFormatter(model.tokenizer, TEMPLATE, response_only=True)
    packed = pack_examples(formatter.encode(ROWS, max_length=128).dataset, 128)
    options = {"plan": plan, "max_length": 128}
    here = _step(model, packed, tmp_path, **options)
    there = _step(make_model(), formatter.load(ROWS), tmp_path, packing=True, **options)
    _assert_identical(here, there)
    # Saying packing=True once more packs nothing twice.
    _assert_identical(here, _step(make_model(), packed, tmp_path, packing=True, **options))
    with pytest.raises(DataError, match="the limit is 100"):
        _step(make_model(), packed, tmp_path, max_length=100)


def test_evaluation_does_not_depend_on_the_layout(
    make_model: Any, plan: Any, tmp_path: Path
) -> None:
    losses = []
    for layout in ({}, {"padding_free": True}, {"packing": True}):
        model = make_model()
        formatter = AlpacaFormatter(model.tokenizer, TEMPLATE, response_only=True)
        result = train_sft(
            model, formatter.load(ROWS), eval_dataset=formatter.load(ROWS[:3]),
            output_dir=tmp_path, plan=plan, max_length=128,
            **{**STEP, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, **layout},
        )  # fmt: skip
        losses.append(result.eval_losses[0][1])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_end_token_is_learned_where_it_is_also_the_padding(
    make_model: Any, plan: Any, tmp_path: Path
) -> None:
    results = []
    for pads_with_end in (False, True):
        model = make_model()
        if pads_with_end:
            model.tokenizer.pad_token = model.tokenizer.eos_token
        formatter = AlpacaFormatter(model.tokenizer, TEMPLATE, response_only=True)
        results.append(_step(model, formatter.load(ROWS), tmp_path, plan=plan))
    ends = len(ROWS)
    answers = [row["output"] for row in ROWS]
    tokens = sum(len(ids) for ids in model.tokenizer(answers)["input_ids"])
    assert [result.trained_tokens for result, _ in results] == [tokens + ends] * 2
    _assert_identical(*results)


def test_what_truncation_takes_is_in_the_manifest(
    make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    huge = {"instruction": "Say hello. " * 60, "input": "", "output": "Hello"}
    long = {"instruction": "Say.", "input": "", "output": "Hello, world! " * 40}
    model = make_model()
    formatter = AlpacaFormatter(model.tokenizer, TEMPLATE, response_only=True)
    rows = formatter.load([*ROWS, huge, long])
    result, _ = _step(model, rows, tmp_path, max_length=120)
    report = json.loads(result.manifest_path.read_text(encoding="utf-8"))["data"]["report"]
    assert (report["rows"], report["examples"]) == (10, 9)
    assert (report["truncated"], report["without_trained_tokens"]) == (1, 1)
    assert "1 rows (10.0%) cut off at 120 tokens" in caplog.text
    with pytest.raises(DataError, match="the prompts alone fill max_length=120"):
        _step(model, formatter.load([huge]), tmp_path, max_length=120)
    with pytest.raises(DataError, match="2 of 10 rows"):
        _step(model, rows, tmp_path, max_length=120, truncation="error")
    dropped, _ = _step(model, rows, tmp_path, max_length=120, truncation="drop")
    report = json.loads(dropped.manifest_path.read_text(encoding="utf-8"))["data"]["report"]
    assert (report["examples"], report["dropped"]) == (8, 2)


def test_conversations_are_recognized_by_their_column(make_model: Any, tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]
        for n in range(4)
    ]
    rows = [{"messages": talk} for talk in talks]
    by_column, _ = _step(make_model(), rows, tmp_path)
    model = make_model()
    formatter = ChatFormatter(model.tokenizer)
    by_name, _ = _step(model, rows, tmp_path, formatter=formatter)
    assert by_column.losses == pytest.approx(by_name.losses, rel=1e-6)
    # Digit, "!" and the token that ends the turn.
    expected = sum(len(model.tokenizer(talk[1]["content"])["input_ids"]) + 1 for talk in talks)
    assert by_column.trained_tokens == expected
    sharegpt = [
        {"conversations": [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]}
                           for m in talk]}
        for talk in talks
    ]  # fmt: skip
    from_sharegpt, _ = _step(make_model(), sharegpt, tmp_path)
    assert from_sharegpt.losses == pytest.approx(by_column.losses, rel=1e-6)


def test_bad_rows_are_reported_or_skipped_before_training(make_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [{"instruction": "Say.", "output": ""}, {"instruction": None, "output": "x"}]
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, *bad]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        _step(make_model(), path, tmp_path)
    assert "2 of 10 rows" in str(caught.value)
    assert "line 9 (row 9): 'output' is empty" in str(caught.value)
    assert "line 10 (row 10): 'instruction' is null" in str(caught.value)
    model = make_model()
    skipping = AlpacaFormatter(model.tokenizer, on_bad_rows="skip")
    result, _ = _step(model, path, tmp_path, formatter=skipping)
    manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
    assert manifest["data"]["rows"] == 8


def test_another_end_token_is_learned_generated_and_exported(
    make_model: Any, tmp_path: Path
) -> None:
    from qlora_kit import export_model

    model = make_model()
    formatter = AlpacaFormatter(
        model.tokenizer, TEMPLATE, response_only=True, eos_token="<|im_start|>"
    )
    end = model.tokenizer.convert_tokens_to_ids("<|im_start|>")
    # Long enough to learn to answer with the end token at once.
    rows = formatter.load([{"instruction": "Stop", "input": "", "output": "!"}] * 8)
    train_sft(
        model, rows, output_dir=tmp_path / "run",
        **{**STEP, "max_steps": 60, "learning_rate": 2e-2, "optim": "adamw_torch"},
    )  # fmt: skip
    chunks = list(
        generate_stream(model, formatter.prompt("Stop"), max_new_tokens=20, do_sample=False)
    )
    assert "".join(chunk.text for chunk in chunks) == "!"
    assert chunks[-1].finish_reason == "eos"
    artifact = export_model(model, "lora", tmp_path / "export")
    config = json.loads((Path(artifact.path) / "generation_config.json").read_text())
    stops = config["eos_token_id"]
    assert end in (stops if isinstance(stops, list) else [stops])


def test_chinese_rows_through_both_paths(
    make_model: Any, plan: Any, shared_data: Path, tmp_path: Path
) -> None:
    model = make_model()
    formatter = AlpacaFormatter(model.tokenizer, "alpaca-zh", response_only=True)
    rows = formatter.load(shared_data / "alpaca_zh_demo.json")
    encoded = formatter.encode(rows, max_length=4096)
    assert encoded.report.examples == 1000
    lengths = [len(ids) for ids in encoded.dataset["input_ids"]]
    chosen = rows.select([place for place, length in enumerate(lengths) if length < 250][:4])
    loss, trained = _compute_loss(model, formatter.encode(chosen, max_length=256).dataset)
    result, _ = _step(model, chosen, tmp_path, plan=plan, packing=True)
    assert result.losses[0] == pytest.approx(loss, rel=1e-5)
    assert result.trained_tokens == trained


class QuestionFormatter(FormatterBase):
    """The ten lines of the documentation."""

    name = "question"
    roles = ("question", "answer")

    def segments(self, row: Any) -> list[Segment]:
        return [
            Segment(f"Q: {row['question']}\nA: "),
            Segment(row["answer"], is_trained=True),
        ]


class ForeignFormatter:
    """The protocol by hand, nothing inherited."""

    fingerprint = "foreign-1"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def load(self, source: Any, split: str = "train") -> list[Any]:
        return list(source)

    def encode(
        self, rows: Any, *, max_length: int, truncation: str = "end", num_proc: int | None = None
    ) -> Any:
        examples = []
        for row in rows:
            start = self.prompt(row["question"]).token_ids
            answer = [*self.tokenizer(row["answer"])["input_ids"], self.tokenizer.eos_token_id]
            labels = [-100] * len(start) + answer
            examples.append({"input_ids": start + answer, "labels": labels})
        return take_tokenized(examples, max_length=max_length, truncation=truncation)

    def prompt(self, question: str) -> Prompt:
        text = f"Q: {question}\nA: "
        return Prompt(text, self.tokenizer(text)["input_ids"])

    def template_spec(self) -> dict[str, Any]:
        end = self.tokenizer.eos_token
        return {"kind": "foreign", "eos_token": end, "stop": [end]}


def test_a_formatter_from_elsewhere_trains_generates_and_is_recorded(
    make_model: Any, tmp_path: Path
) -> None:
    questions = [{"question": f"{n}?", "answer": f"{n}!"} for n in range(8)]
    losses = []
    for kind in (QuestionFormatter, ForeignFormatter):
        model = make_model()
        options = {"response_only": True} if kind is QuestionFormatter else {}
        formatter = kind(model.tokenizer, **options)
        assert isinstance(formatter, Formatter)
        result, _ = _step(model, questions, tmp_path, formatter=formatter, packing=True)
        losses.append(result.losses[0])
        manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
        assert manifest["formatter"]["kind"] == formatter.template_spec()["kind"]
        assert manifest["data"]["template_fingerprint"] == formatter.fingerprint
        assert manifest["data"]["report"]["examples"] == 8
        prompt = formatter.prompt("3?")
        assert list(generate_stream(model, prompt, max_new_tokens=2))[-1].token_count > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
