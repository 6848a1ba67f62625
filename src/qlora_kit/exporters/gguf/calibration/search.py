"""``quantization="auto:4.5bpw"``: the types that cost a model least at a given size.

Every matrix is stored once in a probing type and the loss of that alone is measured. A loss is
quadratic in a small error, so other types cost in proportion to their own squared error, weighted
by the importance of each column. Then bits go where they save most per byte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qlora_kit.errors import ConfigError
from qlora_kit.exporters.gguf.calibration.loss import Loss, LossMeter, Matrix, find_matrices, store
from qlora_kit.exporters.gguf.conversion.file_plan import Plan, count_tensor_bytes, round_up
from qlora_kit.exporters.gguf.quantization.mixtures import allows_quantization
from qlora_kit.exporters.gguf.quantization.recipes import BLOCK_SIZES, Recipe
from qlora_kit.exporters.gguf.quantization.targets import Target

__all__ = ["Choice", "choose_by_loss", "list_plain_recipes"]

logger = logging.getLogger(__name__)

#: What a matrix may be stored in, the smallest first; those whose blocks fit its rows count.
_CANDIDATES: Final = (
    "Q2_K", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1",
    "Q6_K", "Q8_0",
)  # fmt: skip

#: What plain recipe a choice stands beside: the largest of these that is no larger.
_PLAIN: Final = (
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m",
    "iq3_m", "iq3_s", "q3_k_s", "q2_k",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Types by tensor, and how they do.

    Attributes:
        types: Every tensor's type.
        size: Bytes of tensor data.
        loss: What they cost, measured together.
        plain: The plain recipe of the nearest size that is no larger.
        plain_size: Its bytes.
        plain_loss: What it costs.
        tokens: How many tokens that was measured on.
    """

    types: Mapping[str, str]
    size: int
    loss: Loss
    plain: str | None
    plain_size: int
    plain_loss: Loss | None
    tokens: int

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        facts: dict[str, Any] = {
            "bytes": self.size,
            "kl": round(self.loss.kl, 5),
            "same_top": round(self.loss.same_top, 4),
            "tokens": self.tokens,
            "types": {
                kind: sum(found == kind for found in self.types.values())
                for kind in sorted(set(self.types.values()))
            },
        }
        if self.plain is not None and self.plain_loss is not None:
            facts["beside"] = {
                "quantization": self.plain,
                "bytes": self.plain_size,
                "kl": round(self.plain_loss.kl, 5),
                "same_top": round(self.plain_loss.same_top, 4),
            }
        return facts


def choose_by_loss(
    plan: Plan,
    target: Target,
    meter: LossMeter,
    progress: Callable[[str, int, int], None],
) -> Choice:
    """Measure, and spend the bytes.

    Args:
        plan: A plan of the model in every plain recipe of this module.
        target: The size asked for.
        meter: What measures.
        progress: Called after each matrix.

    Raises:
        ConfigError: When nothing is that small.
    """
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    free = [name for name, shape in shapes.items() if allows_quantization(name, shape)]
    matrices = find_matrices(plan.tensors, free)
    budget = target.count_bytes(sum(_count(shape) for shape in shapes.values()))
    kept = {name: "F32" for name in shapes if name not in set(free)}
    budget_left = budget - sum(_size(shapes[name], "F32") for name in kept)
    options = {}
    for done, matrix in enumerate(matrices, start=1):
        options[matrix] = _measure_matrix(meter, matrix)
        progress("measuring what each matrix loses", done, len(matrices))
    chosen = _spend(options, budget_left)
    types = kept | {matrix.name: kind for matrix, kind in chosen.items()}
    size = sum(_size(shapes[name], kind) for name, kind in types.items())
    loss = meter.measure(chosen)
    plain = _find_plain(plan, size)
    plain_loss = None
    if plain is not None:
        plain_types = plan.types[plain.name]
        plain_loss = meter.measure({matrix: plain_types[matrix.name] for matrix in matrices})
    choice = Choice(
        types,
        size,
        loss,
        None if plain is None else plain.name,
        0 if plain is None else plan.data_bytes(plain),
        plain_loss,
        meter.tokens,
    )
    logger.info("Types chosen by their loss: %s", choice.describe())
    return choice


def list_plain_recipes() -> list[str]:
    """The recipes that a plan for :func:`choose_by_loss` needs."""
    return list(_PLAIN)


def _measure_matrix(meter: LossMeter, matrix: Matrix) -> list[tuple[int, float, str]]:
    """Bytes, loss and type of every way to store a matrix, those worth it, the smallest first."""
    import torch

    weight = meter.weight(matrix)
    importance = meter.importance(matrix)
    columns = weight.shape[-1]
    by_column = torch.ones(columns) if importance is None else torch.from_numpy(importance)
    squares = {}
    for kind in _CANDIDATES:
        if columns % BLOCK_SIZES[kind] == 0:
            error = store(weight, kind, importance, matrix.name) - weight
            squares[kind] = float((error.square() @ by_column).double().sum())
    if not squares:
        return [(_size(matrix.shape, "F16"), 0.0, "F16")]
    probe = min(squares, key=lambda kind: _size(matrix.shape, kind))
    measured = max(meter.measure({matrix: probe}).kl, 1e-12)
    scale = measured / squares[probe] if squares[probe] > 0 else 0.0
    found = sorted(
        (_size(matrix.shape, kind), square * scale, kind) for kind, square in squares.items()
    )
    return _lower_hull(found)


def _lower_hull(points: Sequence[tuple[int, float, str]]) -> list[tuple[int, float, str]]:
    """Those that no mixture of others beats: each step saves less per byte than the one before."""
    hull: list[tuple[int, float, str]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(small: tuple[int, float, str], large: tuple[int, float, str]) -> float:
    return (small[1] - large[1]) / (large[0] - small[0])


def _spend(
    options: Mapping[Matrix, Sequence[tuple[int, float, str]]], budget: int
) -> dict[Matrix, str]:
    """From the smallest types on, the step that saves most per byte first."""
    level = dict.fromkeys(options, 0)
    spent = sum(found[0][0] for found in options.values())
    if spent > budget:
        raise ConfigError(
            f"The smallest types for this model take {spent / 1e6:.1f} MB of what is quantized, "
            f"and {max(budget, 0) / 1e6:.1f} MB were asked for. Ask for more, or for a type such "
            "as 'iq2_m'."
        )
    steps = sorted(
        (
            (_gain(found[i], found[i + 1]), found[i + 1][0] - found[i][0], index, i)
            for index, found in enumerate(options.values())
            for i in range(len(found) - 1)
        ),
        key=lambda step: (-step[0], step[2], step[3]),
    )
    matrices = list(options)
    for _, cost, index, i in steps:
        # On a hull a matrix's steps come in order; one that was too dear ends its climb.
        if level[matrices[index]] == i and spent + cost <= budget:
            level[matrices[index]] = i + 1
            spent += cost
    return {matrix: options[matrix][step][2] for matrix, step in level.items()}


def _find_plain(plan: Plan, size: int) -> Recipe | None:
    fitting = [recipe for recipe in plan.recipes if plan.data_bytes(recipe) <= size]
    return max(fitting, key=plan.data_bytes, default=None)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for dimension in shape:
        total *= dimension
    return total


def _size(shape: tuple[int, ...], kind: str) -> int:
    return round_up(count_tensor_bytes(shape, kind))
