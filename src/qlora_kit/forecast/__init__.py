"""What a training will take, from shapes alone: memory by part, speed, disk.

Nothing here reads a weight. What a step decides by itself is decided by the native engine's own
plan, so that what is foretold is what is done.
"""

from __future__ import annotations

from qlora_kit.forecast.cards import Card, find_card, list_cards
from qlora_kit.forecast.memory import MemoryForecast, forecast_memory
from qlora_kit.forecast.scaling import MOST_MEASURED, find_efficiency, find_step_seconds
from qlora_kit.forecast.shapes import ModelShape, read_shape

__all__ = [
    "MOST_MEASURED",
    "Card",
    "MemoryForecast",
    "ModelShape",
    "find_card",
    "find_efficiency",
    "find_step_seconds",
    "forecast_memory",
    "list_cards",
    "read_shape",
]
