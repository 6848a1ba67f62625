"""Comparing written files with where they came from.

The standard checks read every tensor back and re-tokenize; the full ones run the file in
llama.cpp beside the live model. Tolerances stand here, one per type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.conversion.file_plan import Plan
from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor
from qlora_kit.exporters.gguf.quantization.recipes import Recipe
from qlora_kit.exporters.gguf.tokenizer.comparison import check_vocabulary
from qlora_kit.exporters.gguf.tokenizer.vocabulary import find_special_ids
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
from qlora_kit.exporters.gguf.verification.llama_run import LlamaRun
from qlora_kit.handles import LoadedModel
from qlora_kit.results import Check
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["LOG_PROBABILITY_TOLERANCES", "TENSOR_TOLERANCES", "check_files", "check_run"]

#: Largest root-mean-square error of a tensor, relative to its own root mean square. Twice
#: what normally distributed weights give, and beyond what any tensor of SmolLM2 does.
TENSOR_TOLERANCES: Final[Mapping[str, float]] = {
    "F32": 1e-7,
    "F16": 8e-4,
    "BF16": 4e-3,
    "Q8_0": 0.012,
    "Q6_K": 0.04,
    "Q5_K": 0.075,
    "Q5_1": 0.085,
    "Q5_0": 0.09,
    "Q4_K": 0.15,
    "Q4_1": 0.17,
    "Q4_0": 0.20,
    "Q3_K": 0.33,
    "Q2_K": 0.55,
}

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
}

# Merging into the original weights leaves the live 4-bit base's own error between the two.
_QUANTIZED_BASE_SLACK: Final = 1.0

# What the live model must prefer its choice by for another one to be an error: in 16 bits its
# own log-probabilities are uncertain by a tenth.
_CLEAR_MARGIN: Final = 0.3

_ROWS_COMPARED: Final = 64

_PROBES: Final = ("The capital of Italy is", "Once upon a time, there was a")
# Asked as the formatter that trained the model asks; plainly where there is none.
_QUESTION: Final = "Name three primary colors."

_PROBE_TOKENS: Final = 12


def check_files(
    files: Sequence[tuple[Recipe, Path]],
    plan: Plan,
    source: TensorSource,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int] = (),
) -> list[Check]:
    """Read files back: their tensors against the source, their vocabulary against the tokenizer.

    Every tensor is read from the source once, whatever the number of files. The special ids
    must be those that the tokenizer and ``stop_token_ids`` ask for.
    """
    opened = [(recipe, GgufFile(path)) for recipe, path in files]
    faults = {recipe.name: _find_layout_fault(file, plan, recipe) for recipe, file in opened}
    sound = [(recipe, file) for recipe, file in opened if not faults[recipe.name]]
    worst = {recipe.name: (0.0, "none") for recipe, _ in sound}
    for planned in plan.tensors:
        truth = _sample_rows(planned, source)
        for recipe, file in sound:
            allowed = TENSOR_TOLERANCES[plan.types[recipe.name][planned.name]]
            share = _relative_error(file, planned.name, *truth) / allowed
            # Written so that a NaN, which compares false, counts as worst.
            if not share <= worst[recipe.name][0]:
                worst[recipe.name] = (share, planned.name)
    checks = []
    for recipe, file in opened:
        if faults[recipe.name]:
            checks.append(Check(f"tensors of {recipe.name}", False, faults[recipe.name]))
        else:
            checks.append(_describe_worst(recipe, *worst[recipe.name], len(plan.tensors)))
        checks.append(_check_tokenizer(file, tokenizer, stop_token_ids, recipe))
    return checks


def _find_layout_fault(file: GgufFile, plan: Plan, recipe: Recipe) -> str:
    """What is wrong with a file's list of tensors, or an empty string."""
    wanted = {tensor.name for tensor in plan.tensors}
    if wanted != set(file.tensors):
        return (
            f"The file's tensors are not those planned: {sorted(wanted ^ set(file.tensors))[:3]}."
        )
    for planned in plan.tensors:
        type_name = plan.types[recipe.name][planned.name]
        if file.type_of(planned.name) != type_name or file.shape(planned.name) != planned.shape:
            return (
                f"{planned.name} is {file.type_of(planned.name)} of shape "
                f"{file.shape(planned.name)}, and should be {type_name} of {planned.shape}."
            )
    return ""


def _describe_worst(recipe: Recipe, worst: float, name: str, count: int) -> Check:
    return Check(
        f"tensors of {recipe.name}",
        worst <= 1.0,
        f"{count} tensors read back; the largest error, in {name}, is {worst:.2f} of what its "
        "type allows.",
        worst,
        1.0,
    )


def _sample_rows(
    planned: PlannedTensor, source: TensorSource
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Evenly spaced rows of a tensor: their indices, and what they should hold."""
    import numpy as np

    right = planned.load(source)
    right = right.reshape(-1, right.shape[-1])
    count = min(_ROWS_COMPARED, right.shape[0])
    rows = np.unique(np.linspace(0, right.shape[0] - 1, count).astype(np.int64))
    return rows, right[rows].float().numpy()


def _relative_error(
    file: GgufFile, name: str, rows: NDArray[np.int64], truth: NDArray[np.float32]
) -> float:
    import numpy as np

    written = file.read_rows(name, rows)
    # A damaged file may hold anything; what is not a number counts as the worst error.
    with np.errstate(all="ignore"):
        scale = float(np.sqrt(np.mean(np.square(truth, dtype=np.float64))))
        error = float(np.sqrt(np.mean(np.square(written - truth, dtype=np.float64))))
    return error / scale if scale > 0 else error


def _check_tokenizer(
    file: GgufFile,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    recipe: Recipe,
) -> Check:
    name = f"tokenizer of {recipe.name}"
    written = file.vocabulary()
    try:
        count, _ = check_vocabulary(written, tokenizer)
    except UnsupportedModelError as error:
        return Check(name, False, str(error))
    for role, wanted in find_special_ids(tokenizer, stop_token_ids).items():
        found = written.special_ids.get(role)
        if found != wanted:
            token = tokenizer.convert_ids_to_tokens(wanted)
            return Check(name, False, f"{role} is token {found}, and should be {wanted} ({token}).")
    return Check(name, True, f"{count} texts are tokenized as by the live tokenizer.", 0.0, 0.0)


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
        tolerance = LOG_PROBABILITY_TOLERANCES[recipe.base_type] + slack
        with contextlib.closing(LlamaRun(path, plain, lora=lora)) as run:
            checks.extend(_compare(run, probes, model, recipe, tolerance))
    return checks


def _probe_live_model(model: LoadedModel) -> list[_Probe]:
    import torch

    probes = []
    with model.engine.inference(model) as live, torch.no_grad():
        device = next(live.parameters()).device
        for prompt in _make_prompts(model):
            ids = list(prompt)
            for _ in range(_PROBE_TOKENS):
                logits = live(torch.tensor([ids], device=device)).logits[0, -1]
                ids.append(int(logits.argmax()))
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
