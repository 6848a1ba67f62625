"""TRL's trainer as the native engine uses it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

from trl import SFTTrainer

from qlora_kit.engines.native.bitsandbytes_optimizers import without_waiting
from qlora_kit.engines.native.fast.fast_step import FastStep
from qlora_kit.engines.native.fast.plan import FastPlan, parse_plan
from qlora_kit.engines.native.fast.support import find_obstacle
from qlora_kit.engines.trainer_mixins import NoDraftCards, NoTelemetry, PortableLoss, StepRecorder
from qlora_kit.errors import EngineError

__all__ = ["NativeTrainer"]

logger = logging.getLogger(__name__)


class NativeTrainer(StepRecorder, FastStep, PortableLoss, NoTelemetry, NoDraftCards, SFTTrainer):
    """``SFTTrainer`` that leaves the adapter's dtype and the model's forward as it found them.

    TRL 1.15 rounds every trainable parameter of a quantized model to bfloat16 when the
    trainer is made, which loses small updates; the classic script trains float32 adapters.
    It also replaces the model's ``forward`` by one with a fused language-model head;
    :meth:`release` takes it off again.

    Args:
        model: A ``PeftModel``.
        args: The run's ``SFTConfig``.
        plan: What :func:`~qlora_kit.engines.native.fast.plan.parse_plan` takes.
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
        is_fast = _decide(model, args, asked)
        if is_fast:
            args = copy.copy(args)
            # The fast path recomputes layers itself and filters losses without waiting for them.
            args.gradient_checkpointing = False
            args.logging_nan_inf_filter = False
        before = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._own_forward = model.get_base_model().__dict__.get("forward")
        # TRL changes the model before transformers has looked at the settings, and may refuse them.
        try:
            try:
                super().__init__(model=model, args=args, **kwargs)
            finally:
                for name, parameter in model.named_parameters():
                    if name in before and parameter.dtype != before[name].dtype:
                        parameter.data = before[name].to(parameter.device)
            if is_fast:
                self.start_fast(model, asked)
        except BaseException:
            self._put_forward_back(model)
            raise

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The run's optimizer; bitsandbytes' ones do not wait for the GPU."""
        optimizer_class, settings = SFTTrainer.get_optimizer_cls_and_kwargs(args, model)
        if isinstance(optimizer_class, type):
            optimizer_class = without_waiting(optimizer_class)
        return optimizer_class, settings

    def release(self) -> None:
        """Give the model back its own ``forward``, and free what training allocated."""
        self.stop_fast()
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self._put_forward_back(self.model)

    def _put_forward_back(self, model: Any) -> None:
        base = model.get_base_model()
        if self._own_forward is None:
            base.__dict__.pop("forward", None)
        else:
            base.forward = self._own_forward


def _decide(model: Any, args: Any, asked: FastPlan) -> bool:
    if asked.enabled is False:
        return False
    obstacle = find_obstacle(model, args)
    if obstacle is None:
        return True
    if asked.enabled is True:
        raise EngineError(
            f"plan asks for the fast training step, which does not cover this run: {obstacle}. "
            "Leave enabled='auto' to train through TRL and peft."
        )
    logger.info("Training through TRL and peft, not the fast training step: %s.", obstacle)
    return False
