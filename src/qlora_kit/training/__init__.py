"""Training: TRL's ``SFTTrainer`` on rows that are already token ids and labels.

This stage joins data, configuration and an engine's trainer, watches the run and reports.
It does not know how a model is laid out or how a training step is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import device as device_module
from qlora_kit.engines.base import TrainJob
from qlora_kit.errors import ConfigError, DataError, MissingDependencyError, TrainingError
from qlora_kit.manifest import describe_model, to_jsonable, write_manifest
from qlora_kit.results import AdaptedModel, LoadedModel, TrainResult
from qlora_kit.training.arguments import (
    DataOptions,
    Optimizer,
    build_arguments,
    choose_optimizer,
    take_data_options,
)
from qlora_kit.training.examples import (
    TrainingData,
    make_collator,
    prepare_examples,
    prepare_training_data,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from qlora_kit.training.monitoring import InterruptCallback

__all__ = ["train_sft"]

logger = logging.getLogger(__name__)

_CHECKPOINT_PREFIX = "checkpoint-"


def train_sft(
    model: AdaptedModel,
    train_dataset: Any,
    *,
    formatter: Any = None,
    output_dir: str | os.PathLike[str] = "outputs",
    eval_dataset: Any = None,
    packing: bool = False,
    truncation: str = "end",
    plan: Any = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    resume_from_checkpoint: bool | str | os.PathLike[str] | None = None,
    **sft_config: Any,
) -> TrainResult:
    """Fine-tune the adapter with TRL's ``SFTTrainer`` and the classic script's settings.

    The loss of an optimizer step is the mean over every trained token of its effective batch,
    however it is split into micro-batches. What was not asked for: 2 rows x 4 accumulation
    steps, 60 steps, learning rate 2e-4 with linear decay after 5 warm-up steps, weight decay
    0.01, 8-bit AdamW where the device has it, seed 3407.

    Args:
        model: What :func:`~qlora_kit.attach_lora` returned.
        train_dataset: What ``formatter.load`` returned, or anything it takes, with Alpaca's
            columns, ``messages`` or ``conversations``, a ``text`` column, or ``input_ids`` (and
            ``labels``, and ``seq_lengths`` where ``pack_examples`` packed them) already.
        formatter: Overrides the formatter that the rows carry.
        output_dir: Checkpoints and ``qlora_kit_manifest.json`` go here.
        eval_dataset: Held-out rows, or a dictionary of them; evaluated four times over the run
            unless ``eval_strategy`` or ``eval_steps`` says otherwise.
        packing: Fill rows of ``max_length`` tokens with several examples, which never see each
            other.
        truncation: For examples beyond ``max_length``: ``"end"`` cuts them, ``"drop"`` leaves
            them out, ``"error"`` raises. Counted and reported in every case.
        plan: How the native engine computes steps; none of it changes the maths. ``None``
            chooses by memory and says what it chose; ``False`` trains through TRL and peft alone;
            a dictionary or :class:`~qlora_kit.engines.native.fast.plan.FastPlan` pins choices,
            for example ``{"checkpointing": "full", "weights": "nf4"}``.
        callbacks: ``TrainerCallback`` objects or classes.
        resume_from_checkpoint: ``True`` for the last checkpoint in ``output_dir``, or a path.
        **sft_config: Any field of TRL's ``SFTConfig``, by its own name.

    Returns:
        Losses per step, tokens, seconds, memory, versions and the manifest's path. After Ctrl-C,
        the same for the steps that were done, with the checkpoint to resume from.

    Raises:
        ConfigError: When the model has no adapter to train or a setting cannot work;
            ``UnknownOptionError`` for unknown fields, with the nearest name.
        DataError: When rows are missing or malformed, or none has a token to train on.
        TrainingError: When the device runs out of memory; nothing is changed silently.
    """
    _check_model(model)
    fields = {**sft_config, "packing": packing}
    options = take_data_options(model, fields, truncation)
    folder = Path(output_dir)
    device = device_module.get_device()
    optimizer = choose_optimizer(fields.pop("optim", None), device)
    if optimizer.note:
        logger.info("Optimizer: %s.", optimizer.note)
    resume = _find_checkpoint(resume_from_checkpoint, folder)
    args = build_arguments(
        model,
        fields,
        output_dir=folder,
        device=device,
        optimizer=optimizer,
        has_eval=eval_dataset is not None,
    )
    data = prepare_training_data(model, train_dataset, formatter, options, args.seed)
    eval_rows = _prepare_eval(model, eval_dataset, data, options)
    is_flat = data.is_packed or options.padding_free
    job = TrainJob(
        args=args,
        train_dataset=data.dataset,
        eval_dataset=eval_rows,
        collator=make_collator(model, options, is_flat=is_flat),
        is_packed=is_flat,
        callbacks=tuple(callbacks or ()),
        plan=plan,
        chooses_checkpointing=(
            "gradient_checkpointing" not in sft_config
            and model.adapter.use_gradient_checkpointing == "auto"
        ),
    )
    if data.formatter is not None:
        model.record.formatter = data.formatter
    return _run(model, job, data, optimizer, device, folder, resume, options)


def _run(
    model: AdaptedModel,
    job: TrainJob,
    data: TrainingData,
    optimizer: Optimizer,
    device: Any,
    folder: Path,
    resume: str | None,
    options: DataOptions,
) -> TrainResult:
    from qlora_kit.training.monitoring import (
        InterruptCallback,
        ProgressLine,
        replace_progress_callbacks,
    )

    interrupts, line = InterruptCallback(), ProgressLine()
    device_module.reset_peak_memory(device)
    memory_before = device_module.measure_memory_gib(device)
    with _released_afterwards(model) as release:
        try:
            trainer = model.engine.make_trainer(model, job)
        except RuntimeError as error:
            if "requires" in str(error) and "installed" in str(error):
                raise MissingDependencyError(f"report_to={job.args.report_to}: {error}") from error
            raise
        release.append(trainer)
        replace_progress_callbacks(trainer, line)
        trainer.add_callback(interrupts)
        started = time.perf_counter()
        try:
            with interrupts.listening():
                trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            interrupts.was_requested = True
            _save_checkpoint(trainer)
        # CUDA's out-of-memory error is a RuntimeError of its own class in every torch we support.
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            raise TrainingError(
                f"Out of memory: {str(error).splitlines()[0]} The batch was not changed. Lower "
                "per_device_train_batch_size (and raise gradient_accumulation_steps alike, which "
                "keeps the maths), lower max_length, or set gradient_checkpointing=True."
            ) from error
        finally:
            line.close()
        seconds = time.perf_counter() - started
    peak = device_module.measure_peak_memory_gib(device)
    result = _make_result(
        model, trainer, interrupts, optimizer, device, folder,
        seconds=seconds, memory_before=memory_before, peak_memory=max(peak, memory_before),
        resumed=resume,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, "training", _describe_run(model, job, data, options, result))
    model.record.training = result
    logger.info("%s", result)
    return result


def _check_model(model: Any) -> None:
    if not isinstance(model, AdaptedModel):
        hint = (
            "attach an adapter first: model = attach_lora(model)"
            if isinstance(model, LoadedModel)
            else "it takes what attach_lora returned"
        )
        raise ConfigError(f"train_sft got {type(model).__name__}; {hint}.")
    if model.trainable_parameters == 0:
        raise ConfigError(
            "This adapter was loaded for inference only; load it with is_trainable=True."
        )


def _prepare_eval(model: AdaptedModel, rows: Any, data: TrainingData, options: DataOptions) -> Any:
    """Evaluation rows are formatted like the training rows and never packed."""
    if rows is None:
        return None
    if isinstance(rows, Mapping):
        return {name: _prepare_eval(model, part, data, options) for name, part in rows.items()}
    try:
        return prepare_examples(model, rows, data.formatter, options).dataset
    except DataError as error:
        raise DataError(f"eval_dataset: {error}") from error


def _find_checkpoint(asked: bool | str | os.PathLike[str] | None, folder: Path) -> str | None:
    if asked is None or asked is False:
        return None
    found = sorted(
        (path for path in folder.glob(f"{_CHECKPOINT_PREFIX}*") if path.is_dir()),
        key=lambda path: (
            int(path.name.removeprefix(_CHECKPOINT_PREFIX) or 0)
            if path.name.removeprefix(_CHECKPOINT_PREFIX).isdigit()
            else -1
        ),
    )
    names = ", ".join(path.name for path in found) or "none"
    if asked is True:
        if not found:
            raise ConfigError(
                f"resume_from_checkpoint=True, but {folder} holds no {_CHECKPOINT_PREFIX}N folder."
            )
        return str(found[-1])
    path = Path(asked)
    if not (path / "trainer_state.json").is_file():
        raise ConfigError(
            f"resume_from_checkpoint={str(path)!r} is not a checkpoint folder (it has no "
            f"trainer_state.json). Checkpoints in {folder}: {names}."
        )
    return str(path)


@contextlib.contextmanager
def _released_afterwards(model: AdaptedModel) -> Iterator[list[Any]]:
    """Leave the model as it was found, but for what it learned, however training ends."""
    module = model.model
    was_training, use_cache = module.training, module.config.use_cache
    had_checkpointing = module.is_gradient_checkpointing
    embeddings = module.get_input_embeddings()
    hooks_before = set(embeddings._forward_hooks)
    trainers: list[Any] = []
    try:
        yield trainers
    finally:
        for trainer in trainers:
            # accelerate wraps forward in autocast and never takes it off by itself.
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            if hasattr(trainer, "release"):
                trainer.release()
            if trainer.args.gradient_checkpointing and not had_checkpointing:
                module.gradient_checkpointing_disable()
        # TRL and transformers both ask for input gradients; only one of the hooks is kept track of.
        for key in set(embeddings._forward_hooks) - hooks_before:
            del embeddings._forward_hooks[key]
        module.config.use_cache = use_cache
        module.train(was_training)


def _save_checkpoint(trainer: Any) -> None:
    """Save after a hard interrupt, unless no step was done yet."""
    if trainer.state.global_step > 0 and trainer.optimizer is not None:
        trainer._save_checkpoint(trainer.model, trial=None)


def _make_result(
    model: AdaptedModel,
    trainer: Any,
    interrupts: InterruptCallback,
    optimizer: Optimizer,
    device: Any,
    folder: Path,
    *,
    seconds: float,
    memory_before: float,
    peak_memory: float,
    resumed: str | None,
) -> TrainResult:
    steps = trainer.state.global_step
    begun = trainer.step_losses
    first = 0
    if resumed is not None:
        first = int(Path(resumed).name.removeprefix(_CHECKPOINT_PREFIX))
    checkpoint = folder / f"{_CHECKPOINT_PREFIX}{steps}"
    history = tuple(dict(entry) for entry in trainer.state.log_history)
    # A hard interrupt can leave a step that was begun and not finished.
    losses = tuple(begun[: max(0, steps - first)])
    return TrainResult(
        steps=steps,
        losses=losses,
        eval_losses=tuple(
            (int(entry["step"]), float(entry["eval_loss"]))
            for entry in history
            if "eval_loss" in entry
        ),
        tokens_seen=trainer.tokens_seen,
        trained_tokens=trainer.trained_tokens,
        tokens_per_second=trainer.tokens_seen / seconds if seconds > 0 else 0.0,
        seconds=seconds,
        device=device_module.get_device_name(device),
        memory_before_gib=memory_before,
        peak_memory_gib=peak_memory,
        trainable_parameters=model.trainable_parameters,
        total_parameters=model.total_parameters,
        optimizer=optimizer.name,
        optimizer_note=optimizer.note,
        was_interrupted=interrupts.was_requested,
        checkpoint=checkpoint if checkpoint.is_dir() else None,
        output_dir=folder,
        manifest_path=folder / "qlora_kit_manifest.json",
        versions=device_module.get_versions(),
        log_history=history,
        plan=str(getattr(trainer, "fast_plan", None) or "TRL and peft"),
    )


def _describe_run(
    model: AdaptedModel,
    job: TrainJob,
    data: TrainingData,
    options: DataOptions,
    result: TrainResult,
) -> dict[str, Any]:
    return {
        **describe_model(model),
        "data": data.summary,
        "data_options": dataclasses.asdict(options),
        "seeds": {"training": job.args.seed, "adapter": model.adapter.random_state},
        # Sanitized: without tokens.
        "arguments": to_jsonable(job.args.to_sanitized_dict()),
        "result": to_jsonable(result),
    }
