"""Signals that end a run: the step in hand is finished, and a checkpoint is saved."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

from transformers import TrainerCallback

__all__ = ["InterruptCallback"]

logger = logging.getLogger(__name__)

#: Ctrl-C, and what schedulers and closed terminals send. Windows lacks the last two.
_NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class InterruptCallback(TrainerCallback):
    """A signal ends the run after the step in hand and saves a checkpoint; twice ends it at once.

    What must not be torn apart, an optimizer's step or a checkpoint that is being written, is
    finished even then.

    Attributes:
        was_requested: Whether a signal came while there were steps to do.
    """

    def __init__(self) -> None:
        self.was_requested = False
        self._is_training = False
        self._holds = 0
        self._number: int | None = None
        self._late: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over until the run is written down; only the main thread can.

        One that came when there was nothing left to stop is sent again in the end.
        """
        before = self._take_over() if _is_main_thread() else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._late is not None:
                os.kill(os.getpid(), self._late)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While there are steps to do, which a second signal ends at once."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """While something is done that no signal may tear apart."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def came_too_late(self) -> None:
        """Say that the signal ended nothing: every step was done by then.

        Ctrl-C has had its effect then; whoever sent another one waits for the process to end.
        """
        if self._number is not None and self._number != signal.SIGINT:
            self._late = self._number

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Until the step is counted: weights and optimizer would be of different steps.
        self._holds += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._holds = 0
        if self.was_requested:
            control.should_save = True
            control.should_training_stop = True

    def _take_over(self) -> dict[int, Any]:
        before: dict[int, Any] = {}
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is None:
                continue
            handler = signal.getsignal(number)
            # Ctrl-C is for whoever is in the foreground. The others may be ignored on purpose, as
            # nohup does, or be handled by the program, which then knows better.
            if name == "SIGINT" or handler is signal.SIG_DFL:
                # None: installed by something other than Python, which cannot be put back.
                before[number] = signal.SIG_DFL if handler is None else handler
                signal.signal(number, self._on_signal)
        return before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._is_training:
            if not self.was_requested:
                self._late = number
            logger.warning("%s: training is over; it is being written down.", name)
            return
        if not self.was_requested:
            self.was_requested = True
            self._number = number
            is_key = number == signal.SIGINT
            logger.warning(
                "Interrupted%s: finishing this step and saving a checkpoint. %s to stop at once.",
                "" if is_key else f" by {name}",
                "Press Ctrl-C again" if is_key else f"Send {name} again",
            )
        elif self._holds:
            logger.warning("%s: what is being saved or updated is finished first.", name)
        else:
            raise KeyboardInterrupt


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
