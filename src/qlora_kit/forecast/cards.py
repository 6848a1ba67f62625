"""Cards by name: how much memory they have, and the speed that their makers quote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from qlora_kit.errors import ConfigError, did_you_mean

__all__ = ["Card", "find_card", "list_cards"]

_GIB: Final = 1024**3
_MEMORY: Final = re.compile(r"[\s_-](\d+)\s*gi?b$", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A device to train on.

    Attributes:
        name: Its name.
        memory_bytes: What a program can have of it.
        teraflops: Speed of large 16-bit products, in 10^12 floating-point operations a second;
            ``None`` where that is not known.
        source: ``"quoted"`` by the maker (dense, summed in float32) or ``"measured"`` here.
        kind: ``"cuda"`` or ``"cpu"``.
    """

    name: str
    memory_bytes: int
    teraflops: float | None
    source: str = "quoted"
    kind: str = "cuda"

    @property
    def memory_gib(self) -> float:
        """Memory in GiB."""
        return self.memory_bytes / _GIB


#: GiB, and dense bfloat16 (float16 before Ampere) TFLOP/s summed in float32, as quoted.
_KNOWN: Final = {
    "T4": (15, 65), "V100 16GB": (16, 112), "V100 32GB": (32, 112), "L4": (22.5, 121),
    "A10G": (22.5, 70), "L40S": (45, 362), "A100 40GB": (39.5, 312), "A100 80GB": (79, 312),
    "H100": (79, 989), "H200": (139, 989), "B200": (178, 2250),
    "GTX 1080 Ti": (11, 11), "RTX 2060": (6, 26), "RTX 2080 Ti": (11, 54),
    "RTX 3050 8GB": (8, 18), "RTX 3060 12GB": (12, 25), "RTX 3060 Ti": (8, 32),
    "RTX 3070": (8, 41), "RTX 3080 10GB": (10, 60), "RTX 3090": (24, 71),
    "RTX 4060": (8, 30), "RTX 4060 Ti 16GB": (16, 44), "RTX 4070": (12, 58),
    "RTX 4070 Ti": (12, 80), "RTX 4080": (16, 97), "RTX 4090": (24, 165),
    "RTX 5060 Ti 16GB": (16, 47), "RTX 5070": (12, 62), "RTX 5080": (16, 113),
    "RTX 5090": (32, 210), "RTX A6000": (48, 155), "RTX 6000 Ada": (48, 182),
}  # fmt: skip


def list_cards() -> tuple[str, ...]:
    """The names that :func:`find_card` knows."""
    return tuple(_KNOWN)


def find_card(name: str) -> Card:
    """A card by its name, or one of so much memory: ``"RTX 3060 12GB"``, ``"24GB"``.

    Raises:
        ConfigError: When no card is called that; names those that are near.
    """
    if not isinstance(name, str):
        raise ConfigError(
            f"card must be a card's name, or its memory such as '12GB'; got {name!r}.",
            parameter="card",
            value=name,
        )
    wanted = _normalize(name)
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb|gib)", name.strip().casefold())
    if amount and float(amount[1]) > 0:
        return Card(f"a card of {name.strip()}", int(float(amount[1]) * _GIB), None)
    exact = [known for known in _KNOWN if _normalize(known) == wanted]
    # "RTX 3060" for "RTX 3060 12GB", and "RTX 3090 24GB" for "RTX 3090".
    loose = [known for known in _KNOWN if _drop_memory(known) == _drop_memory(name)]
    fitting = exact or [known for known in loose if _agrees(known, name)]
    if len(fitting) != 1:
        hint = f" It is one of {', '.join(fitting or loose)}." if fitting or loose else ""
        raise ConfigError(
            f"There is no card {name!r} in the table.{hint or did_you_mean(name, _KNOWN)} Give its "
            f"memory instead, such as '12GB'. Known: {', '.join(_KNOWN)}.",
            parameter="card",
            value=name,
        )
    memory, speed = _KNOWN[fitting[0]]
    return Card(fitting[0], int(memory * _GIB), float(speed))


def _agrees(known: str, wanted: str) -> bool:
    """Whether a memory that was named is that of the card."""
    amount = _MEMORY.search(wanted)
    return amount is None or abs(_KNOWN[known][0] - int(amount[1])) <= 2


def _drop_memory(name: str) -> str:
    return _normalize(_MEMORY.sub("", name))


def _normalize(name: str) -> str:
    text = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.casefold())
    return text.replace("gib", "gb")
