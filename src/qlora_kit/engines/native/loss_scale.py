"""What float16 asks for beside a loss scaler: what it did is logged, what it cannot do is said.

The scaler is accelerate's: losses are multiplied before the backward pass, gradients divided before
they are clipped, steps whose gradients left float16's range are skipped and the scale is halved.
Checkpoints hold it (``scaler.pt``), and resuming goes on with it.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from qlora_kit.errors import EngineError

__all__ = ["LossScaleLog", "check_float16"]

logger = logging.getLogger(__name__)

#: The scale starts high, and finds its place in a few steps.
_MOST_SKIPPED: Final = 8


def check_float16(model: Any, args: Any) -> None:
    """Refuse what no scaler can do, and say what goes without one.

    Args:
        model: A ``PeftModel``.
        args: The run's ``SFTConfig``.

    Raises:
        EngineError: When weights in float16 are to be trained with scaled losses.
    """
    import torch

    narrow = [
        name for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype == torch.float16
    ]  # fmt: skip
    if args.fp16 and narrow:
        raise EngineError(
            f"{narrow[0]} is float16 and to be trained in full, and the loss scaler of float16 "
            "divides no gradients in float16. Load with dtype='bfloat16' or 'float32', or leave it "
            "out of modules_to_save."
        )
    if args.fp16 and args.device.type == "cpu":
        logger.warning(
            "fp16=True does nothing on a CPU, which has no loss scaler; load with dtype='bfloat16' "
            "to compute in 16 bits."
        )
    base = model.get_base_model()
    if not args.fp16 and base.get_input_embeddings().weight.dtype == torch.float16:
        logger.warning(
            "Training in float16 without a loss scaler, which there is for GPUs only: small "
            "gradients are lost. Load with dtype='float32' or 'bfloat16'."
        )


class LossScaleLog:
    """Mixin for ``transformers.Trainer``: the loss scale and the steps it cost, in every log."""

    _counted_step: int = 0
    _skipped_steps: int = 0
    _skipped_in_a_row: int = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch, once the step before it is counted."""
        self._count_skipped()
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with ``loss_scale`` and the number of ``skipped_steps``."""
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        if scaler is not None and "loss" in logs:
            self._count_skipped()
            logs |= {"loss_scale": scaler.get_scale(), "skipped_steps": self._skipped_steps}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _count_skipped(self) -> None:
        step = self.state.global_step  # type: ignore[attr-defined]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.scaler is None or step <= self._counted_step:
            return
        self._counted_step = step
        if not accelerator.optimizer_step_was_skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == _MOST_SKIPPED:
            logger.warning(
                "%d steps in a row were skipped: their gradients left float16's range, whatever "
                "the loss was multiplied by (now %g). Nothing is learned from them. Load with "
                "dtype='bfloat16', or with 'float32' where the card has none.",
                _MOST_SKIPPED, accelerator.scaler.get_scale(),
            )  # fmt: skip
