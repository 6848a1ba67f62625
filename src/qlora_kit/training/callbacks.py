"""Watching a run: a progress line, and what becomes of its checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_kit.engines.base import Trainer
from qlora_kit.manifest import MANIFEST_NAME
from qlora_kit.training.checkpoint import CHECKPOINT_PREFIX, list_checkpoints

__all__ = ["CheckpointKeeper", "ProgressLine", "replace_progress_callbacks"]


class CheckpointKeeper(TrainerCallback):
    """Completes every checkpoint with its manifest, then deletes this run's oldest ones.

    The trainer's own way of deleting takes whatever lies in the folder, and does so before the
    new checkpoint is whole.

    Args:
        complete: Called with the folder of every checkpoint that was written.
        run_id: The run, whose checkpoints alone are deleted.
        limit: How many to keep; ``None`` for all. The best one is kept besides.
        holding: Entered meanwhile, so that no signal interrupts it.

    Attributes:
        step: Optimizer steps done at the last checkpoint; ``None`` before the first.
    """

    def __init__(
        self,
        complete: Callable[[Path], None],
        run_id: str,
        limit: int | None,
        holding: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.step: int | None = None
        self._complete, self._holding = complete, holding
        self._run_id, self._limit = run_id, limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._holding():
            if state.is_world_process_zero:
                folder = Path(args.output_dir)
                saved = folder / f"{CHECKPOINT_PREFIX}{state.global_step}"
                self._complete(saved)
                self._delete_old(folder, {saved.name, Path(state.best_model_checkpoint or "").name})
            self.step = state.global_step

    def _delete_old(self, folder: Path, kept: set[str]) -> None:
        if self._limit is None or self._limit <= 0:
            return
        own = [one.path for one in list_checkpoints(folder) if one.run_id == self._run_id]
        # By time, as the trainer does: one of more steps may be from before a resumption.
        own.sort(key=lambda path: (path / MANIFEST_NAME).stat().st_mtime_ns)
        surplus = len(own) - max(self._limit, len(kept & {path.name for path in own}))
        for path in [path for path in own if path.name not in kept][: max(0, surplus)]:
            shutil.rmtree(path, ignore_errors=True)


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
