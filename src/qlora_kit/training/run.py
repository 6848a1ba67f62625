"""One run, from a job to its result and manifest.

This module watches a trainer and leaves the model as it was, but for what it learned. It does
not know where the job's data came from or how the trainer computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit import device as device_module
from qlora_kit.engines.base import TrainJob
from qlora_kit.errors import (
    ConfigError,
    MissingDependencyError,
    OfflineError,
    QloraKitError,
    TrainingError,
)
from qlora_kit.manifest import describe_model, to_jsonable, write_manifest
from qlora_kit.results import AdaptedModel, TrainResult
from qlora_kit.training.arguments import DataOptions, Optimizer
from qlora_kit.training.checkpoints import CHECKPOINT_PREFIX, Checkpoint
from qlora_kit.training.examples import TrainingData

if TYPE_CHECKING:
    from qlora_kit.training.monitoring import InterruptCallback, LastSave

__all__ = ["run_training"]

logger = logging.getLogger(__name__)

_MISSING: Final = "This run needs a package that is not installed"


def run_training(
    model: AdaptedModel,
    job: TrainJob,
    data: TrainingData,
    optimizer: Optimizer,
    device: Any,
    folder: Path,
    resume: Checkpoint | None,
    options: DataOptions,
) -> TrainResult:
    """Train, and report whatever was done, however it ended.

    Raises:
        ConfigError: When the trainer refuses the settings.
        TrainingError: When the device runs out of memory.
    """
    from qlora_kit.training.monitoring import (
        InterruptCallback,
        LastSave,
        ProgressLine,
        replace_progress_callbacks,
    )

    interrupts, line, saves = InterruptCallback(), ProgressLine(), LastSave()
    device_module.reset_peak_memory(device)
    memory_before = device_module.measure_memory_gib(device)
    with _released_afterwards(model) as release:
        trainer = _make_trainer(model, job)
        release.append(trainer)
        replace_progress_callbacks(trainer, line)
        trainer.add_callback(interrupts)
        trainer.add_callback(saves)
        # Only now: exports take their stop token from it, and a refused run trained nothing.
        if data.formatter is not None:
            model.record.formatter = data.formatter
            _adopt_chat_template(model, data.formatter)
        started = time.perf_counter()
        try:
            with interrupts.listening():
                trainer.train(resume_from_checkpoint=None if resume is None else str(resume.path))
        except KeyboardInterrupt:
            interrupts.was_requested = True
            _save_checkpoint(trainer, saves)
        except ImportError as error:
            if isinstance(error, QloraKitError):
                raise
            raise MissingDependencyError(f"{_MISSING}: {error}") from error
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise TrainingError(
                f"Out of memory: {str(error).splitlines()[0]} The batch was not changed. "
                f"{_advise_on_memory(model, trainer)}"
            ) from error
        finally:
            line.close()
        seconds = time.perf_counter() - started
        # Gone once the trainer is released.
        plan = str(getattr(trainer, "fast_plan", None) or "TRL and peft")
    peak = device_module.measure_peak_memory_gib(device)
    result = _make_result(
        model, trainer, interrupts, saves, optimizer, device, folder,
        seconds=seconds, memory_before=memory_before, peak_memory=max(peak, memory_before),
        resumed=resume, plan=plan,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, "training", _describe_run(model, job, data, options, result))
    model.record.training = result
    if result.was_interrupted:
        logger.warning(
            "Training was interrupted: %d of %d steps are done. %s",
            result.steps, trainer.state.max_steps,
            f"resume_from_checkpoint={str(result.checkpoint)!r} goes on from there."
            if result.checkpoint
            else "Nothing was saved.",
        )  # fmt: skip
    logger.info("%s", result)
    if not all(math.isfinite(loss) for loss in result.losses):
        logger.warning(
            "The loss stopped being a number at step %d: training diverged. Lower learning_rate.",
            result.steps - len(result.losses)
            + next(i for i, loss in enumerate(result.losses, 1) if not math.isfinite(loss)),
        )  # fmt: skip
    return result


def _adopt_chat_template(model: AdaptedModel, formatter: Any) -> None:
    """The tokenizer takes over a chat template that the model is trained with."""
    spec = formatter.template_spec()
    template = spec.get("chat_template")
    if spec.get("name") == "custom" and isinstance(template, str):
        model.tokenizer.chat_template = template
        logger.info("The tokenizer's chat template is the formatter's from now on.")


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's own class is a RuntimeError too, and is named so in every torch we support.
    return type(error).__name__ == "OutOfMemoryError"


def _advise_on_memory(model: AdaptedModel, trainer: Any) -> str:
    """What would have helped where memory ran out.

    Args:
        model: What is trained.
        trainer: Its trainer, or ``None`` while that was being made.
    """
    plan = getattr(trainer, "fast_plan", None)
    if plan is not None:
        # This step lays a whole effective batch out anew, however the settings split it.
        options = {
            "micro_batch_tokens": max(1, plan.micro_batch_tokens // 2),
            "checkpointing": "full",
            **({"weights": "nf4"} if plan.caches_weights else {}),
        }
        text = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in options.items())
        return (
            f"Set plan={{{text}}}, which keeps the maths, or lower max_length: no example is split."
        )
    if trainer is None or getattr(trainer, "uses_fast_step", False):
        in_4bit = "" if model.base.quantization in ("nf4", "fp4") else "load in 4 bits, "
        return (
            "No batch had gone through the model yet: free memory that others hold on the device, "
            f"{in_4bit}or attach a smaller r (now {model.adapter.r})."
        )
    args = trainer.args
    advice = ["lower max_length"]
    if args.per_device_train_batch_size > 1:
        advice.insert(
            0,
            "lower per_device_train_batch_size (and raise gradient_accumulation_steps alike, which "
            "keeps the maths)",
        )
    if not args.gradient_checkpointing:
        advice.append("set gradient_checkpointing=True")
    if args.eval_strategy != "no" and args.per_device_eval_batch_size > 1:
        advice.append("if it was evaluating, lower per_device_eval_batch_size")
    text = ", or ".join(advice)
    return f"{text[0].upper()}{text[1:]}."


def _make_trainer(model: AdaptedModel, job: TrainJob) -> Any:
    """The engine's trainer; what transformers and TRL refuse becomes an error of ours."""
    try:
        return model.engine.make_trainer(model, job)
    except QloraKitError:
        raise
    except (RuntimeError, ImportError) as error:
        if isinstance(error, RuntimeError) and _is_out_of_memory(error):
            raise TrainingError(
                f"Out of memory: {str(error).splitlines()[0]} {_advise_on_memory(model, None)}"
            ) from error
        if isinstance(error, ImportError) or "to be installed" in str(error):
            raise MissingDependencyError(f"{_MISSING}: {error}") from error
        raise
    except ConnectionError as error:
        raise OfflineError(
            f"The trainer wants the network, which is off: {error} Drop push_to_hub."
        ) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"The trainer refuses these settings: {error}") from error


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
            # What it took off it binds to the instance.
            if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                del module.forward
            if hasattr(trainer, "release"):
                trainer.release()
            if trainer.args.gradient_checkpointing and not had_checkpointing:
                module.gradient_checkpointing_disable()
        # TRL and transformers both ask for input gradients; only one of the hooks is kept track of.
        for key in set(embeddings._forward_hooks) - hooks_before:
            del embeddings._forward_hooks[key]
        module.config.use_cache = use_cache
        module.train(was_training)


def _save_checkpoint(trainer: Any, saves: LastSave) -> None:
    """Save after a hard interrupt, unless no step was done yet."""
    if trainer.state.global_step > 0 and trainer.optimizer is not None:
        trainer._save_checkpoint(trainer.model, trial=None)
        saves.on_save(trainer.args, trainer.state, trainer.control)


def _find_saved(
    folder: Path, step: int, saves: LastSave, resumed: Checkpoint | None
) -> Path | None:
    """The checkpoint of the last step done; another run's in the same folder is not one."""
    saved = folder / f"{CHECKPOINT_PREFIX}{step}"
    if saves.step == step and saved.is_dir():
        return saved
    return resumed.path if resumed is not None and resumed.step == step else None


def _make_result(
    model: AdaptedModel,
    trainer: Any,
    interrupts: InterruptCallback,
    saves: LastSave,
    optimizer: Optimizer,
    device: Any,
    folder: Path,
    *,
    seconds: float,
    memory_before: float,
    peak_memory: float,
    resumed: Checkpoint | None,
    plan: str,
) -> TrainResult:
    steps = trainer.state.global_step
    begun = trainer.step_losses
    first = 0 if resumed is None else resumed.step
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
        # Pressed in the last evaluation, it cut no step off. Until training begins max_steps is 0.
        was_interrupted=interrupts.was_requested and not 0 < trainer.state.max_steps <= steps,
        checkpoint=_find_saved(folder, steps, saves, resumed),
        output_dir=folder,
        manifest_path=folder / "qlora_kit_manifest.json",
        versions=device_module.get_versions(),
        log_history=history,
        plan=plan,
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
