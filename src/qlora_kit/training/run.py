"""One run, from a job to its result and manifest.

This module watches a trainer and leaves the model as it was, but for what it learned.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import device as device_module
from qlora_kit import ranks
from qlora_kit.artifacts.provenance import write_checkpoint_manifest
from qlora_kit.boundaries import describe_cause, translate_errors
from qlora_kit.engines.base import Trainer, TrainJob
from qlora_kit.engines.checkpointing import disable_checkpointing, is_checkpointing
from qlora_kit.handles import AdaptedModel
from qlora_kit.import_noise import without_noise
from qlora_kit.manifest import write_manifest
from qlora_kit.report import write_report
from qlora_kit.results import TrainResult
from qlora_kit.training.arguments import DataOptions, Optimizer
from qlora_kit.training.checkpoint import Checkpoint
from qlora_kit.training.earlier_runs import set_apart
from qlora_kit.training.examples import TrainingData
from qlora_kit.training.failures import explain_failure, make_trainer_or_explain
from qlora_kit.training.identity import RunIdentity
from qlora_kit.training.notices import (
    describe_first_step,
    refuse_dropped_rows,
    say_what_is_idle,
    say_what_was_done,
)
from qlora_kit.training.outcome import Measured, describe_run, make_result
from qlora_kit.training.resumption import Resumption

if TYPE_CHECKING:
    import torch

    from qlora_kit.training.callbacks import CheckpointKeeper
    from qlora_kit.training.interrupts import InterruptCallback

__all__ = ["Run", "run_training"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """All that was settled before a run begins.

    Attributes:
        job: What the engine's trainer gets.
        data: The training rows.
        options: How they were prepared.
        optimizer: The optimizer, and why it is that one.
        device: Where it runs.
        folder: The output folder.
        identity: What makes it this run.
        resumption: Its id, and what it goes on from.
        recipe: What asks for it again.
        sample_prompts: What the model is asked meanwhile.
        sample_steps: How often.
        asked: Fields of ``SFTConfig`` as they were given.
        is_resuming: Whether a checkpoint was asked for, if there should be one.
    """

    job: TrainJob
    data: TrainingData
    options: DataOptions
    optimizer: Optimizer
    device: torch.device
    folder: Path
    identity: RunIdentity
    resumption: Resumption
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sample_prompts: Sequence[str] = ()
    sample_steps: int | None = None
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_resuming: bool = False

    @property
    def first_step(self) -> int:
        """Steps done before this call."""
        checkpoint = self.resumption.checkpoint
        return 0 if checkpoint is None else checkpoint.step

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the run itself."""
        resumed = self.resumption.checkpoint
        return {
            "id": self.resumption.run_id,
            "identity": self.identity,
            "resumed_from": (
                None
                if resumed is None
                else {"path": resumed.path, "step": resumed.step, "run": resumed.run_id}
            ),
            "changes": self.resumption.changes,
        }


def run_training(model: AdaptedModel, run: Run) -> TrainResult:
    """Train, and report whatever was done, however it ended.

    Raises:
        ConfigError: When the trainer refuses the settings.
        TrainingError: When the device runs out of memory.
    """
    from qlora_kit.training.interrupts import InterruptCallback

    interrupts = InterruptCallback()
    with interrupts.listening(), without_noise():
        result, total_steps = _train(model, run, interrupts)
        model.record.training = result
        say_what_was_done(result, total_steps)
        if not result.was_interrupted:
            interrupts.came_too_late()
    return result


def _train(model: AdaptedModel, run: Run, interrupts: InterruptCallback) -> tuple[TrainResult, int]:
    """The result, written down, and the steps that were to be done."""
    from qlora_kit.training.callbacks import (
        CheckpointKeeper,
        ProgressLine,
        Timeline,
        replace_progress_callbacks,
    )
    from qlora_kit.training.samples import SampleAsker
    from qlora_kit.training.shared_cores import SharedCores
    from qlora_kit.training.stopping import StopTogether

    cores = SharedCores(run.device)
    saves = CheckpointKeeper(
        lambda folder: write_checkpoint_manifest(model, folder, run.describe()),
        run.resumption.run_id,
        run.job.args.save_total_limit,
        interrupts.holding,
    )
    device_module.reset_peak_memory(run.device)
    memory_before = device_module.measure_memory_gib(run.device)
    refuse_dropped_rows(run.job)
    with _released_afterwards(model) as release:
        trainer = make_trainer_or_explain(model, _without_limit(run.job))
        release.append(trainer)
        say_what_is_idle(model, run, trainer)
        run = dataclasses.replace(
            run, resumption=set_apart(run.folder, run.resumption, run.identity)
        )
        trainer.while_saving = interrupts.holding
        is_alone = ranks.find_place().world == 1
        timeline = Timeline(run.device, (lambda: trainer.tokens_seen) if is_alone else None)
        line = ProgressLine(timeline, lambda steps: describe_first_step(trainer, run, model, steps))
        trainer.add_callback(timeline)
        replace_progress_callbacks(trainer, line)
        trainer.add_callback(interrupts)
        trainer.add_callback(saves)
        trainer.add_callback(cores)
        if ranks.find_place().world > 1:
            trainer.add_callback(StopTogether(interrupts))
        # Only now: exports take their stop token from it, and a refused run trained nothing.
        # Rows without a formatter leave none: an earlier one would ask for what was not learned.
        model.record.formatter = run.data.formatter
        model.record.examples = run.data.dataset
        if run.data.formatter is not None:
            _adopt_chat_template(model, run.data.formatter)
        asker = SampleAsker(model, run.data.formatter, run.sample_prompts, run.sample_steps)
        trainer.add_callback(asker)
        asker.ask(run.first_step)
        started = time.perf_counter()
        checkpoint = run.resumption.checkpoint
        try:
            with (
                translate_errors(lambda error: explain_failure(error, model, trainer, run.folder)),
                cores.sharing(),
            ):
                _take_steps(trainer, interrupts, saves, checkpoint)
        finally:
            line.close()
        seconds = time.perf_counter() - started
        asker.ask(trainer.state.global_step)
        # Gone once the trainer is released.
        plan = str(trainer.fast_plan or "TRL and peft")
        resolved = trainer.fast_plan
    peak = device_module.measure_peak_memory_gib(run.device)
    measured = Measured(seconds, memory_before, max(peak, memory_before))
    result = dataclasses.replace(
        make_result(model, run, trainer, interrupts, saves, measured, plan),
        timeline=tuple(timeline.moments),
        samples=tuple(asker.samples),
    )
    # One run has one result: the main rank saw its checkpoints written.
    result = ranks.share("training", lambda: result)
    if trainer.is_world_process_zero():
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_manifest(run.folder, "training", describe_run(model, run, result, resolved))
            write_report(run.folder)
        # The model is trained; losing hours of it over a full disk would help nobody.
        except OSError as error:
            logger.error(
                "Training is done, and its manifest could not be written to %s: %s Checkpoints and "
                "the model in memory are whole; free some of that disk before exporting.",
                run.folder, describe_cause(error),
            )  # fmt: skip
    return result, trainer.state.max_steps


def _take_steps(
    trainer: Trainer,
    interrupts: InterruptCallback,
    saves: CheckpointKeeper,
    checkpoint: Checkpoint | None,
) -> None:
    try:
        with interrupts.training():
            trainer.train(
                resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path)
            )
    except KeyboardInterrupt:
        interrupts.was_requested = True
        # After a hard interrupt, unless no step was done yet.
        if trainer.save_checkpoint():
            saves.on_save(trainer.args, trainer.state, trainer.control)


def _without_limit(job: TrainJob) -> TrainJob:
    """The job of a trainer that deletes no checkpoint; the keeper of checkpoints does."""
    args = copy.copy(job.args)
    args.save_total_limit = None
    return dataclasses.replace(job, args=args)


def _adopt_chat_template(model: AdaptedModel, formatter: Any) -> None:
    """The tokenizer takes over a chat template that the model is trained with."""
    spec = formatter.template_spec()
    template = spec.get("chat_template")
    if spec.get("name") == "custom" and isinstance(template, str):
        model.tokenizer.chat_template = template
        logger.info("The tokenizer's chat template is the formatter's from now on.")


@contextlib.contextmanager
def _released_afterwards(model: AdaptedModel) -> Iterator[list[Trainer]]:
    """Leave the model as it was found, but for what it learned, however training ends."""
    module = model.model
    settings = module.config.get_text_config()
    was_training, use_cache = module.training, getattr(settings, "use_cache", True)
    had_checkpointing = is_checkpointing(module)
    embeddings = module.get_input_embeddings()
    hooks_before = set(embeddings._forward_hooks)
    trainers: list[Trainer] = []
    try:
        yield trainers
    finally:
        for trainer in trainers:
            trainer.release()
        if not had_checkpointing and is_checkpointing(module):
            disable_checkpointing(module)
        # TRL and transformers both ask for input gradients; only one of the hooks is kept track of.
        for key in set(embeddings._forward_hooks) - hooks_before:
            del embeddings._forward_hooks[key]
        settings.use_cache = use_cache
        module.train(was_training)
