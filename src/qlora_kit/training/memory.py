"""Memory of a run: what it was foretold to take, and what to do where that was not there."""

from __future__ import annotations

import logging
from typing import Any

from qlora_kit.engines.base import Trainer
from qlora_kit.engines.native.fast.plan import ResolvedPlan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.forecast import forecast_memory, read_shape
from qlora_kit.forecast.steps import RowTokens
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Setting

__all__ = ["advise_on_memory", "describe_memory"]


logger = logging.getLogger(__name__)


def describe_memory(
    model: AdaptedModel, dataset: Any, args: Any, plan: object, device_type: str
) -> dict[str, float] | None:
    """What ``qlora-kit plan`` says of a run, part by part in GiB; ``None`` where it cannot.

    Args:
        model: What was trained.
        dataset: The rows as the trainer got them.
        args: The run's ``SFTConfig``.
        plan: What the step decided; ``None`` where TRL and peft computed it.
        device_type: Where it ran.
    """
    if plan is not None and not isinstance(plan, ResolvedPlan):
        # Another engine's, which knows its own memory.
        return None
    try:
        shape = read_shape(model.model.config)
        sizes = sorted((len(ids) for ids in dataset["input_ids"]), reverse=True)
    # A model of code that came with it, or rows that are not in memory.
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        logger.info("Memory was not foretold part by part: %s", error)
        return None
    longest = sizes[0]
    if "seq_lengths" in dataset.column_names:
        longest = max(max(parts, default=0) for parts in dataset["seq_lengths"])
    step = RowTokens(tuple(sizes), longest, len(sizes)).of_steps(
        args.per_device_train_batch_size, args.gradient_accumulation_steps
    )
    made = forecast_memory(
        shape,
        model.adapter,
        step,
        quantization=model.base.quantization,
        item_bytes=4 if model.base.compute_dtype == "float32" else 2,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        device_type=device_type,
        available=0 if plan is None else plan.usable_bytes,
        asked=FastPlan(enabled=False) if plan is None else _pin(plan),
        recomputes=args.gradient_checkpointing if plan is None else None,
    )
    return made.describe()


def _pin(plan: ResolvedPlan) -> FastPlan:
    """What asks for just what was decided."""
    some = plan.checkpointing == "selective"
    return FastPlan(
        micro_batch_tokens=plan.micro_batch_tokens,
        checkpointing=plan.checkpointing,  # type: ignore[arg-type]  # one of its three words
        checkpointed_layers=plan.checkpointed_layers if some else None,
        weights="cache" if plan.caches_weights else "nf4",
        loss_chunk_tokens=plan.loss_chunk_tokens,
    )


def advise_on_memory(model: AdaptedModel, trainer: Trainer | None) -> list[str | Setting]:
    """What would have helped where memory ran out.

    Args:
        model: What is trained.
        trainer: Its trainer, or ``None`` while that was being made.
    """
    plan = None if trainer is None else trainer.fast_plan
    if plan is not None:
        # This step lays a whole effective batch out anew, however the settings split it.
        options = {
            "micro_batch_tokens": max(1, plan.micro_batch_tokens // 2),
            "checkpointing": "full",
            **({"weights": "nf4"} if plan.caches_weights else {}),
        }
        return [
            "Set ",
            Setting("plan", options),
            ", which keeps the maths, or lower max_length: no example is split.",
        ]
    if trainer is None or trainer.uses_fast_step:
        in_4bit = "" if model.base.quantization in ("nf4", "fp4") else "load in 4 bits, "
        return [
            "No batch had gone through the model yet: free memory that others hold on the device, "
            f"{in_4bit}or attach a smaller r (now {model.adapter.r})."
        ]
    args = trainer.args
    advice: list[str | Setting] = ["Lower max_length"]
    if args.per_device_train_batch_size > 1:
        advice = [
            "Lower per_device_train_batch_size (and raise gradient_accumulation_steps alike, which "
            "keeps the maths), or lower max_length"
        ]
    if not args.gradient_checkpointing:
        advice += [", or set ", Setting("gradient_checkpointing", True)]
    if args.eval_strategy != "no" and args.per_device_eval_batch_size > 1:
        advice.append(", or if it was evaluating, lower per_device_eval_batch_size")
    return [*advice, "."]
