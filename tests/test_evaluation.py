"""Evaluation: losses are training's own, answers are the model's, scores are counted by hand."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit import (
    AlpacaFormatter,
    ChatFormatter,
    evaluate,
    export_model,
    generate_stream,
    train_sft,
)
from qlora_kit.cli import main
from qlora_kit.data import PromptCompletionFormatter, TextFormatter
from qlora_kit.errors import ConfigError
from qlora_kit.evaluation import format_comparison

QUICK = {"max_steps": 1, "plan": False, "disable_tqdm": True}


def test_the_loss_is_that_of_training_s_own_evaluation(make_adapted, alpaca_rows, tmp_path):
    model = make_adapted()
    formatter = AlpacaFormatter(model.tokenizer, response_only=True)
    rows = formatter.load(alpaca_rows)
    seen = []

    def count(predicted):
        scores, labels = predicted.predictions, predicted.label_ids
        scores = scores[0] if isinstance(scores, tuple) else scores
        seen.append((scores.shape[:2], labels.shape))
        return {"hits": float((scores.argmax(-1)[:, :-1] == labels[:, 1:]).sum())}

    result = train_sft(model, rows, eval_dataset=rows, eval_steps=1, output_dir=tmp_path,
                       compute_metrics=count, learning_rate=0.0, **QUICK)  # fmt: skip
    ((_, trained_loss),) = result.eval_losses
    found = evaluate(model, rows, answers=False, batch_size=5)
    assert found.loss == pytest.approx(trained_loss, rel=2e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.trained_tokens == sum(
        label != -100 for row in formatter.encode(rows, max_length=64).dataset for label in
        row["labels"][1:]
    )  # fmt: skip
    assert seen, "compute_metrics was called"
    assert any("eval_hits" in entry for entry in result.log_history)
    with pytest.raises(ConfigError, match="needs rows to evaluate on"):
        train_sft(model, rows, compute_metrics=count, output_dir=tmp_path / "no", **QUICK)


def test_answers_are_the_model_s_and_scored(adapted, alpaca_rows):
    formatter = AlpacaFormatter(adapted.tokenizer)
    rows = alpaca_rows[:3]
    said = [
        "".join(chunk.text for chunk in
                generate_stream(adapted, formatter.prompt(row["instruction"]), max_new_tokens=6))
        for row in rows
    ]  # fmt: skip
    rows = [{**row, "output": text or "x"} for row, text in zip(rows, said, strict=True)]
    rows[2] = {**rows[2], "output": "something else"}
    found = evaluate(
        adapted, rows, formatter=formatter, max_new_tokens=6,
        metrics={"same": lambda answer, expected: answer == expected,
                 "long": lambda answer, expected: len(answer)},
    )  # fmt: skip
    assert [row.answer for row in found.answers] == said
    assert found.scores["same"] == pytest.approx(2 / 3)
    assert found.scores["long"] == pytest.approx(sum(map(len, said)) / 3)
    assert found.answers[0].prompt == str(formatter.prompt(rows[0]["instruction"]))
    few = evaluate(adapted, rows, formatter=formatter, limit=1, max_new_tokens=2)
    assert (few.rows, len(few.answers)) == (1, 1)


def test_named_metrics_and_patterns(adapted, alpaca_rows):
    from qlora_kit.evaluation import METRICS, _read_metrics

    assert METRICS["exact_match"](" a\n", "a") == 1
    assert METRICS["exact_match"]("a b", "a") == 0
    assert METRICS["contains"]("It is PARIS.", "Paris") == 1
    regex = _read_metrics((), r"answer: (\d+)")["regex"]
    assert (regex("my answer: 42!", "answer: 42"), regex("42", "answer: 42")) == (1, 0)
    assert regex("nothing", "nothing") == 0
    for wrong, said in (
        ({"metrics": ["exactmatch"]}, "Did you mean 'exact_match'"),
        ({"regex": "("}, "is no pattern"),
        ({"limit": 0}, "limit"),
        ({"metrics": {"mine": 3}}, "must be a function"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate(adapted, alpaca_rows, **wrong)


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        (PromptCompletionFormatter, {"prompt": "Say: ", "completion": "hello"}, "hello"),
        (TextFormatter, {"text": "All of it."}, None),
        (ChatFormatter, {"messages": [
            {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"},
            {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"},
        ]}, "2"),
    ],
)  # fmt: skip
def test_rows_of_every_kind_are_asked_up_to_their_last_answer(adapted, kind, row, expected):
    formatter = kind(adapted.tokenizer)
    found = evaluate(adapted, formatter.load([row]), max_new_tokens=1)
    assert [one.expected for one in found.answers] == ([] if expected is None else [expected])
    if kind is ChatFormatter:
        assert found.answers[0].prompt == str(formatter.prompt(row["messages"][:3]))
    elif expected:
        assert found.answers[0].prompt.endswith("Say: ")


def test_two_models_side_by_side(adapted, tiny_llama, alpaca_rows, tmp_path, capsys):
    export_model(adapted, "lora", tmp_path / "tuned", verify=False)
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(alpaca_rows[:2]), encoding="utf-8")
    command = ["evaluate", str(tmp_path / "tuned"), str(data), "--compare", str(tiny_llama),
               "--dtype", "float32", "--max-new-tokens", "2", "--max-seq-length", "64"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(tmp_path / "tuned"), str(tiny_llama)]
    tuned, base = found.values()
    assert tuned["loss"] != base["loss"]
    assert len(tuned["answers"]) == len(base["answers"]) == 2
    assert main([*command, "--regex", "number (.*)"]) == 0
    printed = capsys.readouterr().out
    assert f"{tuned['loss']:.4f}" in printed
    assert "regex" in printed
    assert "expected         The number is 0." in printed
    one = evaluate(adapted, alpaca_rows[:1], answers=False)
    assert format_comparison({"a": one, "b": one}).splitlines()[1].split()[0] == "loss"


@pytest.mark.slow
def test_the_harness_asks_an_export_the_task_of_the_page(adapted16, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    page = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"
    (task,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "otters.yaml").write_text(task, encoding="utf-8")
    rows = [{"question": f"Is {n} a number?", "answer": "yes"} for n in range(4)]
    (tmp_path / "otters.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    export_model(adapted16, "merged_16bit", tmp_path / "merged", verify=False)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=merged",
        "--include_path", "tasks", "--tasks", "otters", "--output_path", "out", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (written,) = (tmp_path / "out").rglob("results_*.json")
    measured = json.loads(written.read_text(encoding="utf-8"))["results"]["otters"]
    assert 0 <= measured["acc,none"] <= 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metrics": 5}, "metrics must be names, or functions by name"),
        ({"metrics": {"x": len}}, "must be a function of an answer and the expected one"),
        ({"metrics": {"x": lambda one, other: "good"}}, "returned 'good' for an answer"),
        ({"regex": ""}, "regex must be a pattern"),
        ({"answers": "no"}, "answers must be True or False"),
    ],
)
def test_what_cannot_score_is_named(adapted, settings, said):
    rows = [{"instruction": "Say one.", "output": "one"}]
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluate(adapted, rows, max_new_tokens=1, **settings)


def test_a_pattern_without_answers_is_refused(adapted, alpaca_rows):
    with pytest.raises(ConfigError, match="asks for none"):
        evaluate(adapted, alpaca_rows, answers=False, regex="a")


def test_a_model_is_not_compared_with_itself(tiny_llama, tmp_path, capsys):
    command = ["evaluate", str(tiny_llama), "rows.json", "--compare", f"{tiny_llama}/"]
    assert main(command) == 1
    assert "is the model itself" in capsys.readouterr().err
