"""TRL's trainer as the native engine uses it."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from qlora_kit.engines.offline import NoTelemetry
from qlora_kit.engines.portable_loss import PortableLoss
from qlora_kit.engines.recording import StepRecorder

__all__ = ["NativeTrainer"]


class NativeTrainer(StepRecorder, PortableLoss, NoTelemetry, SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` that leaves the adapter's dtype and the model's forward as it found them.

    TRL 1.15 rounds every trainable parameter of a quantized model to bfloat16 when the
    trainer is made, which loses small updates; the classic script trains float32 adapters.
    It also replaces the model's ``forward`` by one with a fused language-model head;
    :meth:`release` takes it off again.
    """

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        before = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._own_forward = model.get_base_model().__dict__.get("forward")
        super().__init__(*args, model=model, **kwargs)
        for name, parameter in model.named_parameters():
            if name in before and parameter.dtype != before[name].dtype:
                parameter.data = before[name].to(parameter.device)

    def release(self) -> None:
        """Give the model back its own ``forward``."""
        base = self.model.get_base_model()
        if self._own_forward is None:
            base.__dict__.pop("forward", None)
        else:
            base.forward = self._own_forward
