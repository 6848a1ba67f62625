"""Ranks stop together: a signal that reached one of them ends the run of all at one step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qlora_kit import ranks

__all__ = ["StopTogether"]


class StopTogether(TrainerCallback):
    """Asks every other rank at each step's end whether it was told to stop.

    Args:
        interrupts: Has ``was_requested``, which is set on every rank when it is on one.
    """

    def __init__(self, interrupts: Any) -> None:
        self._interrupts = interrupts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asks = self._interrupts.was_requested or control.should_training_stop
        if ranks.any_true(asks):
            self._interrupts.was_requested = (
                self._interrupts.was_requested or state.global_step < state.max_steps
            )
            control.should_save = control.should_save or self._interrupts.was_requested
            control.should_training_stop = True
