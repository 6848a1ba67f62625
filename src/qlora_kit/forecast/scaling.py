"""What steps reach of a device's speed, and several cards of one's, as measured.

The figures are those of docs/performance.md and docs/scale-out.md.
"""

from __future__ import annotations

from typing import Final

__all__ = ["MOST_MEASURED", "find_efficiency", "find_step_seconds"]

#: Cards of one machine that were measured together.
MOST_MEASURED: Final = 4

#: Of a card's quoted speed, what large products of a step reach, and what each micro-batch takes
#: besides: with Qwen3-4B on H200s, packed rows of 16,384 tokens and eight short ones alike.
_CARD_SHARE: Final = 0.45
_CARD_SECONDS: Final = 0.027
#: Of one product's measured speed.
_CPU_SHARE: Final = 0.30

#: Tokens of a step from which cards wait for each other less.
_LARGE_STEP_TOKENS: Final = 8192
#: By a card's tokens of a step, from 2 and 4 H200 over NVLink by median step: 0.935 and 0.935 for
#: 8 short rows, 0.985 and 0.978 for 16,384 packed tokens.
_SMALL: Final = 0.93
_LARGE: Final = 0.98


def find_step_seconds(kind: str, teraflops: float, work: float, micro_batches: int) -> float:
    """How long an optimizer step takes on one device, roughly.

    Args:
        kind: ``"cuda"`` or ``"cpu"``.
        teraflops: The device's speed.
        work: Floating-point operations of the step.
        micro_batches: In how many parts it is computed.
    """
    if kind == "cuda":
        return work / (_CARD_SHARE * teraflops * 1e12) + _CARD_SECONDS * micro_batches
    return work / (_CPU_SHARE * teraflops * 1e12)


def find_efficiency(tokens: int) -> float:
    """The share of their time that several cards do not spend on each other.

    Args:
        tokens: One card's tokens of an average step.
    """
    return _LARGE if tokens >= _LARGE_STEP_TOKENS else _SMALL
