"""What is said of a run before its first step and after its last."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from qlora_kit import ranks
from qlora_kit.engines.base import Trainer, TrainJob
from qlora_kit.errors import ConfigError
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Setting
from qlora_kit.results import TrainResult
from qlora_kit.training.field_effects import Situation, find_idle_fields

if TYPE_CHECKING:
    from qlora_kit.training.run import Run

__all__ = ["describe_first_step", "refuse_dropped_rows", "say_what_is_idle", "say_what_was_done"]

logger = logging.getLogger(__name__)


def refuse_dropped_rows(job: TrainJob) -> None:
    """Refuse a batch that all rows together do not fill where unfilled ones are dropped."""
    rows = len(job.train_dataset)
    batch = job.args.per_device_train_batch_size * ranks.find_place().world
    if job.args.dataloader_drop_last and rows < batch:
        raise ConfigError(
            Setting("dataloader_drop_last", True),
            f" would train nothing: {rows} rows do not fill a batch of {batch}. Leave it out, or "
            "make per_device_train_batch_size smaller.",
            parameter="dataloader_drop_last",
            value=True,
        )


def say_what_is_idle(model: AdaptedModel, run: Run, trainer: Trainer) -> None:
    """Name the settings that this run has no use for, and why; once for all ranks."""
    if not ranks.is_main():
        return
    situation = Situation(
        args=run.job.args,
        has_fast_step=trainer.uses_fast_step,
        has_eval=run.job.eval_dataset is not None,
        has_metrics=run.job.compute_metrics is not None,
        has_experts=hasattr(model.model.config.get_text_config(), "output_router_logits"),
        is_packed=run.data.is_packed,
        is_resuming=run.is_resuming,
        world=ranks.find_place().world,
    )
    _say_what_is_not_learned(run.job.args)
    if run.job.args.torch_compile:
        logger.warning(
            "torch_compile=True compiles the whole model in the first step, which takes minutes%s. "
            "The fast training step is off then, which compiles its layers by itself where that "
            "pays. Leave it out to have that.",
            ", and more on a CPU than most runs win back" if run.device.type == "cpu" else "",
        )  # fmt: skip
    idle = find_idle_fields(run.asked, situation)
    if idle:
        logger.warning(
            "Without effect in this run: %s.",
            "; ".join(f"{name} ({reason})" for name, reason in idle.items()),
        )


def _say_what_is_not_learned(args: Any) -> None:
    """Name a learning rate that is zero, or on its way up, until the run ends."""
    if args.learning_rate == 0:
        logger.warning("learning_rate=0: nothing will be learned.")
        return
    warmup = args.get_warmup_steps(args.max_steps)
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if schedule != "constant" and 0 < args.max_steps <= warmup:
        logger.warning(
            "The learning rate still rises when this run of %d steps ends, and its first step is "
            "taken at 0: it warms up for %d steps. warmup_steps=0 learns from the first one on.",
            args.max_steps, warmup,
        )  # fmt: skip


def describe_first_step(trainer: Trainer, run: Run, model: AdaptedModel, steps: int) -> str:
    """What the silent first step does."""
    from qlora_kit.engines.native.fast.plan_options import parse_plan
    from qlora_kit.engines.native.layers.compilation import find_compile_obstacle, find_too_short

    if run.job.args.torch_compile:
        return "first step: compiling the model, once, minutes"
    asked = parse_plan(run.job.plan).compile
    if not trainer.uses_fast_step or asked is False or find_compile_obstacle(run.device):
        return ""
    if run.device.type == "cuda":
        return "first step: compiling, once, about 20 s"
    # About: the step counts its rows and weights more exactly when it begins.
    args, tokens = run.job.args, int((run.data.summary.get("report") or {}).get("tokens", 0))
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    usual = tokens * rows // max(1, len(run.data.dataset))
    if asked == "auto" and find_too_short(run.device, steps, usual, model.total_parameters):
        return ""
    return "first step: compiling, once, 20 to 60 s"


def say_what_was_done(result: TrainResult, total_steps: int) -> None:
    """Log a run's result, and what went wrong with it."""
    # Once for all ranks.
    if result.was_interrupted and ranks.is_main():
        end = "%s goes on from there." if result.checkpoint else "Nothing was saved.%s"
        resume = Setting("resume_from_checkpoint", str(result.checkpoint))
        logger.warning(
            f"Training was interrupted: %d of %d steps are done. {end}",
            result.steps, total_steps, resume if result.checkpoint else "",
        )  # fmt: skip
    logger.info("%s", result)
    if not all(math.isfinite(loss) for loss in result.losses):
        logger.warning(
            "The loss stopped being a number at step %d: training diverged. Lower learning_rate.",
            result.steps - len(result.losses)
            + next(i for i, loss in enumerate(result.losses, 1) if not math.isfinite(loss)),
        )  # fmt: skip
