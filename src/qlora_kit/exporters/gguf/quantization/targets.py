"""Sizes that a file may be asked for instead of a type: ``auto:4.5bpw``, ``auto:2.4GB``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from qlora_kit.errors import ConfigError

__all__ = ["Target", "parse_target"]

_TARGET: Final = re.compile(r"auto:(\d+(?:\.\d+)?)(bpw|gb|mb)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A size asked for.

    Attributes:
        bits: Bits per weight, or ``None``.
        size: Bytes of tensor data, or ``None``.
    """

    bits: float | None = None
    size: int | None = None

    def count_bytes(self, weights: int) -> int:
        """Bytes of tensor data, for a model of so many weights."""
        return self.size if self.size is not None else int((self.bits or 0.0) * weights / 8)


def parse_target(text: str) -> Target | None:
    """The size behind ``auto:...``; ``None`` for the name of a quantization.

    Raises:
        ConfigError: When it begins so and is no size.
    """
    if not text.lower().startswith("auto"):
        return None
    match = _TARGET.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(
            f"quantization={text!r}: say how large, such as 'auto:4.5bpw' (bits per weight), "
            "'auto:2.4GB' or 'auto:500MB'."
        )
    number, unit = float(match[1]), match[2].lower()
    if unit == "bpw":
        return Target(bits=number)
    return Target(size=int(number * {"gb": 1e9, "mb": 1e6}[unit]))
