"""bitsandbytes' optimizers without a wait for the GPU after every parameter.

``Optimizer8bit.step`` (0.50) synchronizes the device once per parameter, which only paged
states need. With the 504 adapter matrices of a 4B model the card idled 30 ms per step.
The subclass queues the same kernels in the same order.

The module's name matters: transformers looks for "bitsandbytes" in the class's path before it
keeps 8-bit states away from embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["without_waiting"]


@functools.cache
def without_waiting(optimizer_class: Any) -> Any:
    """A subclass that queues all updates at once; any other optimizer class as it is.

    Args:
        optimizer_class: What transformers chose for the run's ``optim``.
    """
    import torch

    if not optimizer_class.__module__.startswith("bitsandbytes."):
        return optimizer_class
    from bitsandbytes.optim.optimizer import Optimizer8bit

    if not issubclass(optimizer_class, Optimizer8bit):
        return optimizer_class

    class _Queued(optimizer_class):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if self.is_paged:
                return super().step(closure)
            loss = None if closure is None else closure()
            if not self.initialized:  # type: ignore[has-type]
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            with torch.no_grad():
                for group_index, group in enumerate(self.param_groups):
                    for index, parameter in enumerate(group["params"]):
                        if parameter.grad is None:
                            continue
                        if not self.state[parameter]:
                            self.init_state(group, parameter, group_index, index)
                        self.update_step(group, parameter, group_index, index)
            return loss

    _Queued.__name__ = _Queued.__qualname__ = optimizer_class.__name__
    return _Queued
