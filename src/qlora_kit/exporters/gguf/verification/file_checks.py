"""Written ``.gguf`` files read back: tensors against their source, the vocabulary in use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.conversion.file_plan import Plan
from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor
from qlora_kit.exporters.gguf.quantization.recipes import Recipe
from qlora_kit.exporters.gguf.tokenizer.comparison import check_vocabulary
from qlora_kit.exporters.gguf.tokenizer.vocabulary import find_special_ids
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
from qlora_kit.results import Check
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["TENSOR_TOLERANCES", "check_files"]

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
    "Q2_K": 0.62,
    "MXFP4": 0.24,
    "IQ4_NL": 0.17,
    "IQ4_XS": 0.17,
    "IQ3_S": 0.34,
    "IQ3_XXS": 0.48,
    "IQ2_S": 0.58,
    "IQ2_XS": 0.74,
    "IQ2_XXS": 0.85,
    # A tensor of nothing but zeros would be off by 1.
    "IQ1_M": 0.95,
    "IQ1_S": 0.95,
    "TQ1_0": 0.99,
    "TQ2_0": 0.99,
}

# Enough to meet every way in which rows can be out of order, few enough to decode in no time.
_ROWS_COMPARED: Final = 64


def check_files(
    files: Sequence[tuple[Recipe, Sequence[Path]]],
    plan: Plan,
    source: TensorSource,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int] = (),
) -> list[Check]:
    """Read files back: their tensors against the source, their vocabulary against the tokenizer.

    Each recipe comes with its file, or the parts that it is split into. Every tensor is read from
    the source once, whatever the number of files. The special ids
    must be those that the tokenizer and ``stop_token_ids`` ask for.
    """
    opened = [(recipe, GgufFile(*parts)) for recipe, parts in files]
    faults = {recipe.name: _find_layout_fault(file, plan, recipe) for recipe, file in opened}
    sound = [(recipe, file) for recipe, file in opened if not faults[recipe.name]]
    worst = {recipe.name: (0.0, "none") for recipe, _ in sound}
    for planned in plan.tensors:
        truth = _sample_rows(planned, source)
        for recipe, file in sound:
            allowed = TENSOR_TOLERANCES[plan.types[recipe.name][planned.name]]
            share = _relative_error(file, planned.name, *truth) / allowed
            # A NaN compares false with everything, also with what comes after it.
            share = math.inf if math.isnan(share) else share
            if share > worst[recipe.name][0]:
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

    # (..., columns) -> (rows, columns), as the file has them; of a vector, one row.
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
    # RMS(written - truth) / RMS(truth) over all sampled rows, since one row may be all zeros; in
    # float64, where the squares of float32 numbers neither overflow nor vanish.
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
