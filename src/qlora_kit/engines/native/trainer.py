"""TRL's trainer as the native engine uses it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from trl import SFTTrainer

from qlora_kit.engines.checkpointing import without_checkpointing
from qlora_kit.engines.native.bitsandbytes_optimizers import without_waiting
from qlora_kit.engines.native.decoding.decoders import begin_training, end_training
from qlora_kit.engines.native.fast.fast_step import FastStep
from qlora_kit.engines.native.fast.plan_options import FastPlan, parse_plan
from qlora_kit.engines.native.fast.shard_choice import refuse_without_fast_step
from qlora_kit.engines.native.fast.support import find_obstacle
from qlora_kit.engines.native.loss_scale import LossScaleLog, check_float16
from qlora_kit.engines.trainer_mixins import TrainerBase
from qlora_kit.errors import EngineError

__all__ = ["NativeTrainer"]

logger = logging.getLogger(__name__)


class NativeTrainer(TrainerBase, LossScaleLog, FastStep, SFTTrainer):
    """``SFTTrainer`` with this engine's own step where the model allows it.

    Args:
        model: A ``PeftModel``.
        args: The run's ``SFTConfig``.
        plan: What :func:`~qlora_kit.engines.native.fast.plan_options.parse_plan` takes.
        chooses_checkpointing: Whether ``args.gradient_checkpointing`` is a mere default, which the
            plan may overrule.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        plan: object = None,
        chooses_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        asked = parse_plan(plan)
        if asked.checkpointing == "auto" and not chooses_checkpointing:
            asked = dataclasses.replace(
                asked, checkpointing="full" if args.gradient_checkpointing else "none"
            )
        self._filters_logged_losses = args.logging_nan_inf_filter
        check_float16(model, args)
        is_fast = _decide(model, args, asked)
        if is_fast:
            # The fast path recomputes layers itself and filters losses without waiting for them.
            args = without_checkpointing(args)
            args.logging_nan_inf_filter = False
        trains_head = is_fast and kwargs.get("compute_metrics") is None
        with _head_unseen(model) if trains_head else contextlib.nullcontext():
            super().__init__(model=model, args=args, **kwargs)
        self._decoded_model = model
        begin_training(model)
        if is_fast:
            self.start_fast(model, asked)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The run's optimizer; bitsandbytes' ones do not wait for the GPU."""
        optimizer_class, settings = SFTTrainer.get_optimizer_cls_and_kwargs(args, model)
        if isinstance(optimizer_class, type):
            optimizer_class = without_waiting(optimizer_class)
        return optimizer_class, settings

    def release(self) -> None:
        """Take the trainer off the model, and free what training allocated."""
        self.stop_fast()
        end_training(self._decoded_model)
        super().release()


@contextlib.contextmanager
def _head_unseen(model: Any) -> Iterator[None]:
    """Past TRL, which refuses adapters of the head: its loss leaves them out, this one does not."""
    model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_output_embeddings


def _decide(model: Any, args: Any, asked: FastPlan) -> bool:
    if asked.enabled is False:
        refuse_without_fast_step(model, asked, "plan option enabled=False turns it off")
        return False
    obstacle = find_obstacle(model, args)
    if obstacle is None:
        return True
    if asked.enabled is True:
        raise EngineError(
            f"plan asks for the fast training step, which does not cover this run: {obstacle}. "
            "Leave enabled='auto' to train through TRL and peft."
        )
    refuse_without_fast_step(model, asked, obstacle)
    logger.info("Training through TRL and peft, not the fast training step: %s.", obstacle)
    return False
