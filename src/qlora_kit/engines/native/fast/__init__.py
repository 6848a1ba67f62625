"""The native engine's own training step: few, large, padding-free micro-batches.

It reads peft's parameters and bitsandbytes' weights where they lie and changes neither the
model nor any library, so the model generates, evaluates and saves as before at any moment.
"""

from qlora_kit.engines.native.fast.plan_options import FastPlan

__all__ = ["FastPlan"]
