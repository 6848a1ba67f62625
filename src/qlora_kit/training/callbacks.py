"""Watching a run: a progress line, Ctrl-C, and what the trainer logs."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qlora_kit.engines.base import Trainer
from qlora_kit.training.resumption import CHECKPOINT_PREFIX

__all__ = ["InterruptCallback", "LastSave", "ProgressLine", "replace_progress_callbacks"]

logger = logging.getLogger(__name__)


class InterruptCallback(TrainerCallback):
    """Ctrl-C ends the run after the step in hand and saves a checkpoint; twice ends it at once.

    Attributes:
        was_requested: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.was_requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT while training runs; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            # None: installed by something other than Python, which cannot be put back.
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.was_requested:
            raise KeyboardInterrupt
        self.was_requested = True
        logger.warning(
            "Interrupted: finishing this step and saving a checkpoint. "
            "Press Ctrl-C again to stop at once."
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.was_requested:
            control.should_save = True
            control.should_training_stop = True


class LastSave(TrainerCallback):
    """Which step this run saved last; what is to be done to each checkpoint.

    Args:
        complete: Called with the folder of every checkpoint that was written.

    Attributes:
        step: Optimizer steps done at the last checkpoint; ``None`` before the first.
    """

    def __init__(self, complete: Callable[[Path], None]) -> None:
        self.step: int | None = None
        self._complete = complete

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        if state.is_world_process_zero:
            self._complete(Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{self.step}")


class ProgressLine(TrainerCallback):
    """One tqdm line: steps, loss, learning rate, evaluation loss."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._bar is None or not logs:
            return
        for key, label in (("loss", "loss"), ("eval_loss", "eval"), ("learning_rate", "lr")):
            if key in logs:
                form = ".1e" if key == "learning_rate" else ".3f"
                self._shown[label] = format(float(logs[key]), form)
        self._bar.set_postfix(self._shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the finished line on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def replace_progress_callbacks(trainer: Trainer, line: ProgressLine) -> None:
    """Put our line in the place of the trainer's bar (which prints each log) or printer."""
    from transformers import PrinterCallback, ProgressCallback

    handler = trainer.callback_handler
    shows_bar = any(isinstance(callback, ProgressCallback) for callback in handler.callbacks)
    for callback in list(handler.callbacks):
        # Subclasses are the user's own, except the notebook's table, which is kept.
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
    if shows_bar and not any(
        type(callback).__name__ == "NotebookProgressCallback" for callback in handler.callbacks
    ):
        trainer.add_callback(line)
