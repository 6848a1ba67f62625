"""What a run did, as its result and its manifest say it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import device as device_module
from qlora_kit.engines.base import Trainer
from qlora_kit.handles import AdaptedModel
from qlora_kit.manifest import MANIFEST_NAME, describe_model, to_jsonable
from qlora_kit.results import TrainResult
from qlora_kit.training.checkpoint import CHECKPOINT_PREFIX, Checkpoint
from qlora_kit.training.looks import describe_looks
from qlora_kit.training.memory import describe_memory

if TYPE_CHECKING:
    from qlora_kit.engines.base import StepPlan
    from qlora_kit.training.callbacks import CheckpointKeeper
    from qlora_kit.training.interrupts import InterruptCallback
    from qlora_kit.training.run import Run

__all__ = ["Measured", "describe_run", "make_result"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Time and memory of a run, under the names that its result has for them.

    Attributes:
        seconds: Wall-clock seconds of the training loop.
        memory_before_gib: Peak memory before it.
        peak_memory_gib: Peak memory during it.
    """

    seconds: float
    memory_before_gib: float
    peak_memory_gib: float


def _find_saved(
    folder: Path, step: int, saves: CheckpointKeeper, resumed: Checkpoint | None
) -> Path | None:
    """The checkpoint of the last step done; another run's in the same folder is not one."""
    saved = folder / f"{CHECKPOINT_PREFIX}{step}"
    if saves.step == step and saved.is_dir():
        return saved
    return resumed.path if resumed is not None and resumed.step == step else None


def _find_best_step(trainer: Trainer) -> int | None:
    """The step whose weights transformers loaded back at the end, if it did."""
    best = trainer.state.best_model_checkpoint
    if not trainer.args.load_best_model_at_end or best is None or not Path(best).is_dir():
        return None
    step: int = trainer.state.best_global_step
    return step


def make_result(
    model: AdaptedModel,
    run: Run,
    trainer: Trainer,
    interrupts: InterruptCallback,
    saves: CheckpointKeeper,
    measured: Measured,
    plan: str,
) -> TrainResult:
    """What a run did, however it ended.

    Args:
        model: What was trained.
        run: What was settled before.
        trainer: Still holding its counts.
        interrupts: Whether somebody stopped it.
        saves: Which checkpoints it wrote.
        measured: Time and memory.
        plan: How steps were computed, in words.
    """
    steps = trainer.state.global_step
    begun = trainer.step_losses
    first = run.first_step
    history = tuple(dict(entry) for entry in trainer.state.log_history)
    # A hard interrupt can leave a step that was begun and not finished.
    losses = tuple(begun[: max(0, steps - first)])
    return TrainResult(
        steps=steps,
        losses=losses,
        eval_losses=tuple(
            (int(entry["step"]), float(value))
            for entry in history
            for name, value in entry.items()
            # With a dictionary of data sets, one for each: eval_NAME_loss.
            if name.startswith("eval_") and name.endswith("loss")
        ),
        tokens_seen=trainer.tokens_seen,
        trained_tokens=trainer.trained_tokens,
        tokens_per_second=(trainer.tokens_seen / measured.seconds if measured.seconds > 0 else 0.0),
        device=device_module.get_device_name(run.device),
        **dataclasses.asdict(measured),
        trainable_parameters=model.trainable_parameters,
        total_parameters=model.total_parameters,
        optimizer=run.optimizer.name,
        optimizer_note=run.optimizer.note,
        # Pressed in the last evaluation, it cut no step off. Until training begins max_steps is 0.
        was_interrupted=interrupts.was_requested and not 0 < trainer.state.max_steps <= steps,
        checkpoint=_find_saved(run.folder, steps, saves, run.resumption.checkpoint),
        output_dir=run.folder,
        manifest_path=run.folder / MANIFEST_NAME,
        versions=device_module.get_versions(),
        log_history=history,
        plan=plan,
        run_id=run.resumption.run_id,
        best_step=_find_best_step(trainer),
    )


def describe_run(
    model: AdaptedModel, run: Run, result: TrainResult, plan: StepPlan | None
) -> dict[str, Any]:
    """What the manifest of a run says.

    Args:
        model: What was trained.
        run: What was settled before.
        result: What it did.
        plan: How steps were computed; ``None`` where TRL and peft did.
    """
    args = run.job.args
    return {
        **describe_model(model),
        "run": run.describe(),
        "recipe": run.recipe,
        "data": run.data.summary,
        "data_options": dataclasses.asdict(run.options),
        # Beyond the loaded model: what the plan promised, and what was then taken.
        "memory": {
            "predicted_gib": None if plan is None else plan.predicted_bytes / 1024**3,
            "measured_gib": result.peak_memory_gib - result.memory_before_gib,
            # The whole of it: the same numbers as before a run.
            "parts": describe_memory(model, run.data.dataset, args, plan, run.device.type),
            "peak_gib": result.peak_memory_gib,
        },
        "seeds": {"training": args.seed, "adapter": model.adapter.random_state},
        # Sanitized: without tokens.
        "arguments": to_jsonable(args.to_sanitized_dict()),
        "result": to_jsonable(result),
        "timeline": [moment._asdict() for moment in result.timeline],
        "samples": [sample._asdict() for sample in result.samples],
        "logged": _read_log(result),
        "looks": describe_looks(run.data.dataset, model.tokenizer),
    }


def _read_log(result: TrainResult) -> list[dict[str, float]]:
    """What a report draws of the trainer's log: steps with losses and learning rates."""
    names = ("step", "loss", "learning_rate", "eval_loss")
    return [
        {name: float(entry[name]) for name in names if name in entry}
        for entry in result.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
