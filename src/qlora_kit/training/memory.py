"""What to do when a device runs out of memory, in the situation that it ran out in."""

from __future__ import annotations

from qlora_kit.engines.base import Trainer
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Setting

__all__ = ["advise_on_memory"]


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
