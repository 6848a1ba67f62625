"""Watching a run: its timeline, a progress line, and what becomes of its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback

from qlora_kit.device import measure_memory_gib
from qlora_kit.engines.base import Trainer
from qlora_kit.manifest import MANIFEST_NAME
from qlora_kit.progress import open_progress
from qlora_kit.results import Moment
from qlora_kit.training.checkpoint import CHECKPOINT_PREFIX, list_checkpoints

__all__ = [
    "CheckpointKeeper",
    "GuardedDisplay",
    "ProgressLine",
    "Timeline",
    "replace_progress_callbacks",
]

logger = logging.getLogger(__name__)

#: transformers' table of losses in a notebook.
_NOTEBOOK: Final = "NotebookProgressCallback"


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


class Timeline(TrainerCallback):
    """When each step ended, with its tokens and the memory in use.

    Args:
        device: Where it trains.
        count_tokens: The tokens taken so far; ``None`` where asking would wait for other ranks.
    """

    def __init__(self, device: Any, count_tokens: Callable[[], int] | None) -> None:
        self._device, self._count = device, count_tokens
        self._started = 0.0
        self.moments: list[Moment] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(
            Moment(
                step=state.global_step,
                seconds=round(time.perf_counter() - self._started, 3),
                tokens=None if self._count is None else self._count(),
                memory_gib=round(measure_memory_gib(self._device), 3),
            )
        )

    @property
    def speed(self) -> float | None:
        """Tokens a second over the last steps; ``None`` before the second."""
        last = self.moments[-11:]
        if len(last) < 2 or last[0].tokens is None or last[-1].tokens is None:
            return None
        seconds = last[-1].seconds - last[0].seconds
        return (last[-1].tokens - last[0].tokens) / seconds if seconds > 0 else None


class ProgressLine(TrainerCallback):
    """One calm line: steps, loss, tokens a second, memory, time left.

    Args:
        timeline: What knows speed and memory; it is called before the line.
        describe_first: What the first step of so many does besides, in a few words.
    """

    def __init__(
        self,
        timeline: Timeline | None = None,
        describe_first: Callable[[int], str] | None = None,
    ) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}
        self._timeline, self._describe_first = timeline, describe_first

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = open_progress(
                state.max_steps, "training", "steps", done=state.global_step,
                bar="{desc} {n_fmt}/{total_fmt} {unit} |{bar:16}| {remaining} left{postfix}",
            )  # fmt: skip
            if self._describe_first and (first := self._describe_first(state.max_steps)):
                self._bar.set_postfix_str(first)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is None:
            return
        self._bar.update(state.global_step - self._bar.n)
        if self._timeline is not None and self._timeline.moments:
            speed = self._timeline.speed
            if speed is not None:
                self._shown["speed"] = f"{speed:,.0f} tokens/s"
            self._shown["memory"] = f"{self._timeline.moments[-1].memory_gib:.1f} GiB"
        self._show(refresh=False)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._bar is None or not logs:
            return
        for key, label in (("loss", "loss"), ("eval_loss", "eval loss")):
            if key in logs:
                self._shown[label] = f"{label} {float(logs[key]):.3f}"
        self._show(refresh=True)

    def _show(self, *, refresh: bool) -> None:
        order = ("loss", "eval loss", "speed", "memory")
        said = ", ".join(self._shown[name] for name in order if name in self._shown)
        self._bar.set_postfix_str(said, refresh=refresh)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the finished line on the screen."""
        bar, self._bar = self._bar, None
        if bar is not None:
            # The terminal may be gone.
            with contextlib.suppress(OSError, ValueError):
                bar.close()


class GuardedDisplay(TrainerCallback):
    """A callback that only shows something: where it fails, training goes on without it.

    A terminal that was closed, or a table that expects a step before the run ends, would take the
    result of hours with it.

    Args:
        display: The callback.
    """

    def __init__(self, display: TrainerCallback) -> None:
        self._display = display
        self._has_failed = False
        for name in dir(TrainerCallback):
            if name.startswith("on_"):
                setattr(self, name, self._guard(getattr(display, name)))

    def _guard(self, event: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._has_failed:
                return None
            try:
                return event(*arguments, **named)
            except Exception as error:  # noqa: BLE001 - somebody else's code, or a closed terminal
                self._has_failed = True
                logger.warning(
                    "%s failed and is left out from here on, training goes on: %s: %s",
                    type(self._display).__name__, type(error).__name__, error,
                )  # fmt: skip
                return None

        return call


def replace_progress_callbacks(trainer: Trainer, line: ProgressLine) -> None:
    """Put our line in the place of the trainer's bar (which prints each log) or printer.

    A user's own subclass of one stays, guarded as ours is.
    """
    from transformers import PrinterCallback, ProgressCallback

    shows_bar = False
    kept: list[TrainerCallback] = []
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback)
        # transformers' table for notebooks needs IPython to be imported.
        is_bar = isinstance(callback, ProgressCallback) or any(
            base.__name__ == _NOTEBOOK for base in kind.__mro__
        )
        shows_bar = shows_bar or is_bar
        if not is_bar and not isinstance(callback, PrinterCallback):
            kept.append(callback)
        elif kind not in (ProgressCallback, PrinterCallback) and kind.__name__ != _NOTEBOOK:
            kept.append(GuardedDisplay(callback))
    # In their places: adding a second one of a class would be warned about.
    trainer.callback_handler.callbacks[:] = [*kept, *([GuardedDisplay(line)] if shows_bar else [])]
