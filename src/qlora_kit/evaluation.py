"""How well a model knows rows: loss, perplexity, and answers beside the ones expected.

Generation writes the answers; this module asks, scores and puts results side by side.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.engines.contract import ready_to_generate
from qlora_kit.errors import ConfigError, DataError, did_you_mean, invalid_value
from qlora_kit.generation import generate_batch
from qlora_kit.handles import LoadedModel
from qlora_kit.html_tables import make_grid, make_table
from qlora_kit.messages import Setting
from qlora_kit.values import IGNORED_LABEL, is_whole_number

if TYPE_CHECKING:
    from qlora_kit.data import FormatterBase, Rows

__all__ = ["METRICS", "EvaluatedRow", "EvaluationResult", "evaluate", "format_comparison"]

logger = logging.getLogger(__name__)

#: What an answer and the expected one get, by name.
METRICS: Final[Mapping[str, Callable[[str, str], float]]] = {
    "exact_match": lambda answer, expected: float(answer.strip() == expected.strip()),
    "contains": lambda answer, expected: float(expected.strip().lower() in answer.lower()),
}

#: Answers that a notebook shows.
_SHOWN_ANSWERS: Final = 5


@dataclasses.dataclass(frozen=True)
class EvaluatedRow:
    """One row's answer.

    Attributes:
        prompt: What the model was asked.
        expected: The answer of the row.
        answer: The model's.
        scores: By metric.
    """

    prompt: str
    expected: str
    answer: str
    scores: Mapping[str, float]


@dataclasses.dataclass(frozen=True, repr=False)
class EvaluationResult:
    """How well a model knows rows.

    Attributes:
        model: The model.
        loss: Mean over the tokens that carry loss.
        trained_tokens: How many these are.
        rows: Rows that were looked at.
        scores: Mean of each metric over the answered rows.
        answers: The answers, in order; empty where none were asked for.
    """

    model: str
    loss: float
    trained_tokens: int
    rows: int
    scores: Mapping[str, float]
    answers: tuple[EvaluatedRow, ...] = dataclasses.field(default=(), repr=False)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __str__(self) -> str:
        scores = "".join(f", {name} {value:.3f}" for name, value in self.scores.items())
        return (
            f"{self.model}: loss {self.loss:.4f}, perplexity {self.perplexity:.3f} over "
            f"{self.trained_tokens:,} tokens of {self.rows:,} rows{scores}"
        )

    def __repr__(self) -> str:
        return f"EvaluationResult({self})"

    def _repr_html_(self) -> str:
        pairs = [
            ("loss", f"{self.loss:.4f}"),
            ("perplexity", f"{self.perplexity:.3f}"),
            ("rows", f"{self.rows:,}, {self.trained_tokens:,} tokens that carry loss"),
            *((name, f"{value:.3f}") for name, value in self.scores.items()),
        ]
        table = make_table(self.model, pairs)
        if not self.answers:
            return table
        shown = self.answers[:_SHOWN_ANSWERS]
        answers = make_grid(
            ("prompt", "expected", "answer", *self.scores),
            [
                (one.prompt, one.expected, one.answer, *map("{:.0f}".format, one.scores.values()))
                for one in shown
            ],
        )
        rest = len(self.answers) - len(shown)
        return table + answers + (f"<p>and {rest:,} more in answers</p>" if rest else "")


def evaluate(
    model: LoadedModel,
    rows: Any,
    *,
    formatter: Any = None,
    metrics: Sequence[str] | Mapping[str, Callable[[str, str], float]] = tuple(METRICS),
    regex: str | None = None,
    answers: bool = True,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    limit: int | None = None,
) -> EvaluationResult:
    """Loss over the tokens that training would learn, and answers beside the expected ones.

    Args:
        model: A loaded or adapted model; left in the mode it was found in.
        rows: What ``formatter.load`` returned, or anything it takes.
        formatter: What formats them; by default the rows' own, or the one the model was trained
            with, or what their columns ask for.
        metrics: Names (``"exact_match"``, ``"contains"``), or functions of an answer and the
            expected one by name.
        regex: A pattern; its first group, or all of it, must be the same in both.
        answers: Whether to ask for answers at all. Rows that are one text have none.
        max_new_tokens: Most tokens of an answer.
        batch_size: Rows whose loss is computed at once.
        limit: Look at that many rows only, the first ones.

    Returns:
        Loss, perplexity, mean scores and every answer.

    Raises:
        ConfigError: When an argument cannot work.
        DataError: When rows cannot be read, or none has a token to learn.
    """
    if not isinstance(model, LoadedModel):
        raise ConfigError(
            f"evaluate takes what load_quantized or attach_lora returned, got "
            f"{type(model).__name__}."
        )
    scorers = _read_metrics(metrics, regex)
    if not isinstance(answers, bool):
        raise invalid_value("answers", "must be True or False", answers, "evaluate")
    if regex is not None and not answers:
        raise ConfigError(
            Setting("regex", regex, "evaluate"),
            " is looked for in answers, and ",
            Setting("answers", False, "evaluate"),
            " asks for none. Drop one of the two.",
            parameter="regex",
            value=regex,
        )
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if not is_whole_number(value, at_least=1):
            raise invalid_value(name, "must be a whole number of at least 1", value, "evaluate")
    if limit is not None and not is_whole_number(limit, at_least=1):
        raise invalid_value("limit", "must be a whole number of at least 1", limit, "evaluate")
    loaded = _load_rows(model, rows, formatter)
    chosen = loaded if limit is None else loaded[:limit]
    encoded = chosen.formatter.encode(chosen, max_length=model.max_seq_length, truncation="end")
    loss, count = _measure_loss(model, encoded.dataset, batch_size)
    if not count:
        raise DataError(f"No row of {chosen.source} has a token that carries loss.")
    answered = _ask(model, chosen, scorers, max_new_tokens) if answers else ()
    means = {
        name: sum(row.scores[name] for row in answered) / len(answered)
        for name in (scorers if answered else ())
    }
    name = str(getattr(model.record, "adapter_path", None) or model.base.name_or_path)
    return EvaluationResult(name, loss, count, len(chosen), means, answered)


def format_comparison(results: Mapping[str, EvaluationResult], *, answers: int = 3) -> str:
    """Results side by side, with a few answers.

    Args:
        results: By what each model is to be called, all of the same rows.
        answers: How many rows to show.
    """
    names = list(results)
    metrics = list(dict.fromkeys(name for one in results.values() for name in one.scores))
    width = max(12, *(len(name) + 2 for name in names))
    lines = [f"{'':<16}" + "".join(f"{name:>{width}}" for name in names)]
    figures: list[tuple[str, list[float]]] = [
        ("loss", [one.loss for one in results.values()]),
        ("perplexity", [one.perplexity for one in results.values()]),
        *((metric, [one.scores.get(metric, math.nan) for one in results.values()])
          for metric in metrics),
    ]  # fmt: skip
    lines += [
        f"{label:<16}" + "".join(f"{value:>{width}.4f}" for value in values)
        for label, values in figures
    ]
    first = next(iter(results.values()))
    for index, row in enumerate(first.answers[:answers]):
        lines += ["", f"expected         {_shorten(row.expected)}"]
        lines += [
            f"{name:<16} {_shorten(one.answers[index].answer)}"
            for name, one in results.items()
            if index < len(one.answers)
        ]
    return "\n".join(lines)


def _shorten(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 90 else plain[:87] + "..."


def _read_metrics(
    metrics: Sequence[str] | Mapping[str, Callable[[str, str], float]], regex: str | None
) -> dict[str, Callable[[str, str], float]]:
    if isinstance(metrics, Mapping):
        scorers = dict(metrics)
        for name, function in scorers.items():
            if not isinstance(name, str) or not _takes_two(function):
                raise ConfigError(
                    f"metrics[{name!r}] must be a function of an answer and the expected "
                    f"one, under its name; got {function!r}.",
                    parameter="metrics",
                    value=metrics,
                )
    elif not isinstance(metrics, str | Sequence):
        raise invalid_value("metrics", "must be names, or functions by name", metrics, "evaluate")
    else:
        scorers = {}
        for name in [metrics] if isinstance(metrics, str) else metrics:
            if not isinstance(name, str) or name not in METRICS:
                raise ConfigError(
                    f"There is no metric {name!r}.{did_you_mean(str(name), METRICS)} Known: "
                    f"{', '.join(METRICS)}; or give functions by name.",
                    parameter="metrics",
                    value=name,
                )
            scorers[name] = METRICS[name]
    if regex is not None:
        if not isinstance(regex, str) or not regex:
            raise invalid_value("regex", "must be a pattern", regex, "evaluate")
        try:
            pattern = re.compile(regex)
        except re.error as error:
            raise ConfigError(
                f"regex {regex!r} is no pattern: {error}.", parameter="regex", value=regex
            ) from error
        scorers["regex"] = lambda answer, expected: float(
            (found := _find(pattern, expected)) is not None and _find(pattern, answer) == found
        )
    return scorers


def _takes_two(function: object) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind("answer", "expected")
    except TypeError:
        return False
    # Of some functions in C nothing is known.
    except ValueError:
        return True
    return True


def _score(name: str, score: Callable[[str, str], Any], answer: str, expected: str) -> float:
    found = score(answer, expected)
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"metrics[{name!r}] returned {found!r} for an answer, and not a number.",
            parameter="metrics",
        ) from error


def _find(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return None if match is None else match[1 if pattern.groups else 0]


def _load_rows(model: LoadedModel, rows: Any, formatter: Any) -> Rows:
    from qlora_kit.data import FormatterBase, Rows, plan_formatter, read_source

    if isinstance(rows, Rows) and formatter is None:
        return rows
    raw = rows if isinstance(rows, Rows) else read_source(rows)
    chosen = formatter or model.record.formatter
    if chosen is None:
        chosen = plan_formatter(() if isinstance(raw, Rows) else raw).make(model.tokenizer)
        logger.info("The model does not say how it was trained; using %s.", type(chosen).__name__)
    if not isinstance(chosen, FormatterBase):
        raise ConfigError(
            f"formatter must derive from FormatterBase to be asked, got {type(chosen).__name__}."
        )
    return chosen.load(raw)


def _measure_loss(model: LoadedModel, dataset: Any, batch_size: int) -> tuple[float, int]:
    """The mean loss per token that carries one, and how many do."""
    import torch
    from torch.nn import functional

    from qlora_kit.data import PaddedCollator

    collate = PaddedCollator(model.tokenizer.pad_token_id)
    # Rows of a length together waste no padding.
    order = sorted(range(len(dataset)), key=lambda index: len(dataset[index]["input_ids"]))
    total, count = 0.0, 0
    with ready_to_generate(model) as ready, torch.no_grad():
        runs: Any = ready
        device = next(runs.parameters()).device
        for start in range(0, len(order), batch_size):
            rows = [dataset[index] for index in order[start : start + batch_size]]
            batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = runs(**batch, use_cache=False).logits[:, :-1]
            is_trained = labels != IGNORED_LABEL
            losses = functional.cross_entropy(
                logits[is_trained].float(), labels[is_trained], reduction="sum"
            )
            total += float(losses)
            count += int(is_trained.sum())
    return (total / count if count else math.nan), count


def _ask(
    model: LoadedModel,
    rows: Rows,
    scorers: Mapping[str, Callable[[str, str], float]],
    max_new_tokens: int,
) -> tuple[EvaluatedRow, ...]:
    asked = list(_list_prompts(rows))
    if not asked:
        logger.info("Rows of %s have no prompt, so no answers were asked for.", rows.source)
        return ()
    prompts = [prompt for prompt, _ in asked]
    answers = generate_batch(model, prompts, max_new_tokens=max_new_tokens)
    return tuple(
        EvaluatedRow(
            str(prompt), expected, answer.text,
            {
                name: _score(name, score, answer.text, expected)
                for name, score in scorers.items()
            },
        )
        for (prompt, expected), answer in zip(asked, answers, strict=True)
    )  # fmt: skip


def _list_prompts(rows: Rows) -> Iterator[tuple[Any, str]]:
    """What each row asks, and the answer that it expects."""
    from qlora_kit.data import ChatFormatter

    formatter: FormatterBase = rows.formatter
    for row in rows:
        if isinstance(formatter, ChatFormatter):
            messages = row["messages"]
            places = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
            if not places or not places[-1]:
                continue
            options = {
                name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)
            }
            expected = messages[places[-1]].get("content")
            if isinstance(expected, str):
                yield formatter.prompt(messages[: places[-1]], **options), expected
            continue
        role = formatter.roles[-1]
        # What stays the same whatever the answer is, is the prompt.
        one, other = formatter.segments(row), formatter.segments({**row, role: "\u2060another"})
        start = 0
        while start < min(len(one), len(other)) and one[start] == other[start]:
            start += 1
        if start and isinstance(row[role], str):
            yield formatter.make_prompt(list(one[:start])), row[role]
