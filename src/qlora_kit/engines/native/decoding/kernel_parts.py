"""What the kernels of a step of one answer and of several have in common, by family.

Imported only where Triton runs.
"""

# Triton reads capitals as constants, and its functions have no types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "activate",
    "cap",
    "halve",
    "normalize",
    "read_turn",
    "shape_heads",
]

#: By :attr:`layer.LayerShape.norm`; 0 is none.
NORMS: Final = {"rms": 1, "rms_wide": 2, "rms_plus_one": 3}
#: By :attr:`layer.LayerShape.activation`.
ACTIVATIONS: Final = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}


def shape_heads(shape: Any, turns: int) -> dict[str, Any]:
    """What attention kernels are told of a family.

    Args:
        shape: A :class:`layer.LayerShape`.
        turns: Dimensions of a head that turn.
    """
    return {"NORM": NORMS[shape.norm], "TURNS": turns, "PAIRS": shape.turns_pairs}


@triton.jit
def normalize(x, factor, weight, NORM: tl.constexpr, kind: tl.constexpr):
    """``x * factor * weight`` as the family rounds it: before the weight, or not at all here."""
    if NORM == 1:
        return (x * factor).to(kind).to(tl.float32) * weight
    if NORM == 3:
        weight += 1.0
    return x * factor * weight


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation in float32."""
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 2:
        # 0.5 (1 + tanh(z)) is sigmoid(2 z).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == 3:
        return tl.maximum(x, 0.0)
    if ACTIVATION == 4:
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x * tl.sigmoid(x)


@triton.jit
def cap(score, softcap, CAPS: tl.constexpr):
    """Soft-capped scores, where the family caps them."""
    if CAPS:
        return softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    return score


@triton.jit
def halve(lane, SIZE: tl.constexpr, TURNS: tl.constexpr, PAIRS: tl.constexpr):
    """Where the dimensions of a head lie that turn with each other; what does not turn follows."""
    turns = lane < TURNS // 2
    if PAIRS:
        left = tl.where(turns, 2 * lane, lane + TURNS // 2)
        right = tl.where(turns, 2 * lane + 1, lane + SIZE // 2)
    else:
        left = tl.where(turns, lane, lane + TURNS // 2)
        right = tl.where(turns, lane + TURNS // 2, lane + SIZE // 2)
    return left, right


@triton.jit
def read_turn(cos, sin, position, lane, TURNS: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines and sines of a position, alike for both dimensions that turn with each other."""
    turns = lane < TURNS // 2
    at = position * TURNS + lane
    if PAIRS:
        at = position * TURNS + 2 * lane
    c = tl.load(cos + at, turns, 1.0).to(tl.float32)
    return c, tl.load(sin + at, turns, 0.0).to(tl.float32)
