"""The training loss where TRL's own cannot run.

TRL 1.15 computes every SFT loss through a triton kernel (``trl/kernels/chunked_logprob.py``)
and has no other path: without triton, or on a CPU, its trainer fails at the first step.
"""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["PortableLoss", "has_triton_loss"]


def has_triton_loss(device_type: str) -> bool:
    """Whether TRL's fused loss runs on a device."""
    return device_type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


class PortableLoss:
    """Mixin for ``SFTTrainer``: the model's own cross-entropy where triton does not run.

    The same number: the sum over trained tokens divided by ``num_items_in_batch``. It builds
    the logits of a micro-batch, which the fused loss avoids, and logs no entropy or accuracy.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of one micro-batch, a scalar."""
        from transformers import Trainer

        if has_triton_loss(self.args.device.type):  # type: ignore[attr-defined]
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        inputs["use_cache"] = False
        return Trainer.compute_loss(
            self,
            model,
            inputs,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
