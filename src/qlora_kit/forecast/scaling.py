"""What several cards reach of as many times one card's speed, as measured (docs/scale-out.md)."""

from __future__ import annotations

from typing import Final

__all__ = ["MOST_MEASURED", "find_efficiency"]

#: Cards of one machine that were measured together.
MOST_MEASURED: Final = 4

#: By a card's tokens of a step, from 2 and 4 H200 over NVLink by median step: 0.935 and 0.935 for
#: 8 short rows, 0.985 and 0.978 for 16,384 packed tokens.
_LARGE_STEP_TOKENS: Final = 8192
_SMALL: Final = 0.93
_LARGE: Final = 0.98


def find_efficiency(tokens: int) -> float:
    """The share of their time that several cards do not spend on each other.

    Args:
        tokens: One card's tokens of an average step.
    """
    return _LARGE if tokens >= _LARGE_STEP_TOKENS else _SMALL
