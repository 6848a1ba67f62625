"""Written ``.gguf`` files run in llama.cpp beside the live model: does it say the same?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qlora_kit.exporters.gguf.quantization.recipes import Recipe
from qlora_kit.exporters.gguf.verification.gguf_file import read_types
from qlora_kit.exporters.gguf.verification.llama_run import LlamaRun
from qlora_kit.handles import LoadedModel
from qlora_kit.results import Check

__all__ = ["LOG_PROBABILITY_TOLERANCES", "check_run"]

#: Largest mean difference of the log-probabilities of the live model's own greedy tokens.
LOG_PROBABILITY_TOLERANCES: Final[Mapping[str, float]] = {
    "F32": 0.05,
    "F16": 0.05,
    "BF16": 0.08,
    "Q8_0": 0.15,
    "Q6_K": 0.3,
    "Q5_K": 0.5,
    "Q5_1": 0.5,
    "Q5_0": 0.5,
    "Q4_K": 0.8,
    "Q4_1": 1.0,
    "Q4_0": 1.2,
    "Q3_K": 2.0,
    "Q2_K": 4.0,
    "MXFP4": 1.5,
    "IQ4_NL": 0.9,
    "IQ4_XS": 0.9,
    "IQ3_S": 2.5,
    "IQ3_XXS": 3.0,
    "IQ2_S": 5.0,
    "IQ2_XS": 6.0,
    "IQ2_XXS": 7.0,
    "IQ1_M": 9.0,
    "IQ1_S": 9.0,
    "TQ1_0": 12.0,
    "TQ2_0": 12.0,
}

# Merging into the original weights leaves the live 4-bit base's own error between the two.
_QUANTIZED_BASE_SLACK: Final = 1.0

# What the live model must prefer its choice by for another one to be an error: in 16 bits its
# own log-probabilities are uncertain by a tenth.
_CLEAR_MARGIN: Final = 0.3

_PROBES: Final = ("The capital of Italy is", "Once upon a time, there was a")
# Asked as the formatter that trained the model asks; plainly where there is none.
_QUESTION: Final = "Name three primary colors."

_PROBE_TOKENS: Final = 12


@dataclass(frozen=True)
class _Probe:
    """A prompt, what the live model goes on with, and how likely it found that."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    margins: tuple[float, ...]


def check_run(
    model: LoadedModel,
    files: Sequence[tuple[Recipe, Path]],
    *,
    merges_into_original: bool,
    lora: Path | None = None,
) -> list[Check]:
    """Run files in llama.cpp beside the live model: greedy choices and log-probabilities."""
    probes = _probe_live_model(model)
    slack = _QUANTIZED_BASE_SLACK if merges_into_original and model.base.quantization else 0.0
    plain = model.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    checks: list[Check] = []
    for recipe, path in files:
        # Of a mixture that was measured, the coarsest type counts.
        used = read_types([path]).values() if recipe.target else [recipe.base_type]
        tolerance = max(LOG_PROBABILITY_TOLERANCES[kind] for kind in used) + slack
        with contextlib.closing(LlamaRun(path, plain, lora=lora)) as run:
            checks.extend(_compare(run, probes, model, recipe, tolerance))
    return checks


def _probe_live_model(model: LoadedModel) -> list[_Probe]:
    import torch

    probes = []
    with model.engine.inference(model) as live, torch.no_grad():
        device = next(model.model.parameters()).device
        for prompt in _make_prompts(model):
            ids = list(prompt)
            for _ in range(_PROBE_TOKENS):
                logits = live(torch.tensor([ids], device=device)).logits[0, -1]
                ids.append(int(logits.argmax()))
            # (T, V); position t predicts token t + 1, so the answer's rows begin one before it.
            logits = live(torch.tensor([ids], device=device)).logits[0].float()
            rows = torch.log_softmax(logits[len(prompt) - 1 : -1], -1).cpu()
            top = rows.topk(2, -1).values
            answer = ids[len(prompt) :]
            probes.append(
                _Probe(
                    tuple(prompt),
                    tuple(answer),
                    tuple(float(row[token]) for row, token in zip(rows, answer, strict=True)),
                    tuple(float(first - second) for first, second in top),
                )
            )
    return probes


def _make_prompts(model: LoadedModel) -> list[list[int]]:
    formatter = model.record.formatter
    if formatter is None:
        asked = list(model.tokenizer(f"Question: {_QUESTION}\nAnswer:")["input_ids"])
    else:
        asked = list(formatter.prompt(_QUESTION).token_ids)
    return [asked, *(list(model.tokenizer(text)["input_ids"]) for text in _PROBES)]


def _compare(
    run: LlamaRun, probes: Sequence[_Probe], model: LoadedModel, recipe: Recipe, tolerance: float
) -> list[Check]:
    differences: list[float] = []
    agreed, total, surprises = 0, 0, 0
    for probe in probes:
        ids = list(probe.prompt_ids)
        for token, wanted, margin in zip(
            probe.answer_ids, probe.log_probabilities, probe.margins, strict=True
        ):
            top, found = run.next_log_probability(ids, token)
            differences.append(abs(found - wanted))
            agreed += top == token
            # A choice that the live model hardly preferred may fall the other way.
            surprises += top != token and margin > max(_CLEAR_MARGIN, 4 * tolerance)
            total += 1
            ids.append(token)
    mean = sum(differences) / len(differences)
    first = probes[0]
    live = model.tokenizer.decode(list(first.answer_ids), skip_special_tokens=True)
    theirs = run.complete(first.prompt_ids, len(first.answer_ids))
    return [
        Check(
            f"log-probabilities of {recipe.name}",
            mean <= tolerance,
            f"In llama.cpp the live model's own tokens differ by {mean:.4f} on average "
            f"({max(differences):.4f} at most) in log-probability.",
            mean,
            tolerance,
        ),
        Check(
            f"greedy text of {recipe.name}",
            surprises == 0,
            f"llama.cpp chose {agreed} of {total} tokens alike and {surprises} against a clear "
            f"preference; the live model goes on with {live!r}, llama.cpp with {theirs!r}.",
            float(surprises),
            0.0,
        ),
    ]
