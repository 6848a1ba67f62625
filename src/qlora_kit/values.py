"""Which values are numbers of a kind, and the one number that means something by itself.

Every check of an argument uses these.
"""

from __future__ import annotations

import math
from typing import Final, TypeGuard

__all__ = ["IGNORED_LABEL", "is_finite_number", "is_number", "is_whole_number"]

#: The label of a token that carries no loss, as PyTorch's cross entropy knows it.
IGNORED_LABEL: Final = -100


def is_whole_number(value: object, *, at_least: int | None = None) -> TypeGuard[int]:
    """Whether a value is an ``int``; ``True`` and ``False`` are none.

    Args:
        value: What was given.
        at_least: The smallest value that will do.
    """
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and (at_least is None or value >= at_least)
    )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an ``int`` or a ``float``, infinite or not a number included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: object, *, at_least: float | None = None) -> TypeGuard[int | float]:
    """Whether a value is an ``int`` or a ``float`` that can be computed with.

    Args:
        value: What was given.
        at_least: The smallest value that will do.
    """
    if not is_number(value) or (at_least is not None and value < at_least):
        return False
    try:
        return math.isfinite(value)
    # A whole number of more than 308 digits.
    except OverflowError:
        return False
