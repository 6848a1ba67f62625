"""Memory by part: what is loaded, what is trained, and what a step holds besides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from qlora_kit.config import AdapterConfig
from qlora_kit.engines.native.fast.plan import ResolvedPlan, resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.step_memory import MemoryModel, count_state_bytes
from qlora_kit.forecast.shapes import ModelShape
from qlora_kit.forecast.steps import StepShape

__all__ = ["MemoryForecast", "forecast_memory"]

_GIB: Final = 1024**3

#: What a process holds before it has loaded anything: CUDA's context and its libraries, or Python
#: with torch.
_RUNTIME_BYTES: Final = {"cuda": 0.5 * _GIB, "cpu": 0.9 * _GIB}


@dataclass(frozen=True)
class MemoryForecast:
    """What a training will hold at its peak, in bytes.

    Attributes:
        weights: The base model.
        adapters: The adapter in float32, and its gradients.
        optimizer: The optimizer's states.
        activations: What layers keep for their backward pass, and their working space.
        dequantized: Base weights that are kept in 16 bits; those made on the fly are working space.
        logits: Scores of the tokens whose loss is computed at once, and their gradient.
        runtime: What the process holds anyway.
        available: What the device has.
        plan: What the step will decide; ``None`` where TRL and peft compute it.
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    dequantized: int
    logits: int
    runtime: int
    available: int
    plan: ResolvedPlan | None = None

    @property
    def parts(self) -> dict[str, int]:
        """Every part by name, in bytes."""
        return {
            "weights": self.weights,
            "adapters": self.adapters,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "dequantized": self.dequantized,
            "logits": self.logits,
            "runtime": self.runtime,
        }

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it fits, with something to spare for what cannot be foreseen.

        The step's own plan leaves a tenth of what is free; TRL's estimate is coarser.
        """
        if self.plan is None:
            return self.total <= 0.9 * self.available
        is_within = self.plan.predicted_bytes <= self.plan.usable_bytes
        return is_within and self.total <= 0.97 * self.available

    def describe(self) -> dict[str, float]:
        """Every part and the sum in GiB."""
        return {
            **{f"{name}_gib": round(size / _GIB, 3) for name, size in self.parts.items()},
            "total_gib": round(self.total / _GIB, 3),
        }


def forecast_memory(
    shape: ModelShape,
    adapter: AdapterConfig,
    step: StepShape,
    *,
    quantization: str | None,
    item_bytes: int,
    optimizer: str,
    device_type: str,
    available: int,
    asked: FastPlan,
    recomputes: bool | None = None,
    shards: int = 1,
) -> MemoryForecast:
    """The peak of a training, by part.

    Args:
        shape: The model.
        adapter: What trains.
        step: How large steps are.
        quantization: How the base is held.
        item_bytes: Bytes of a number that is computed with.
        optimizer: Its name.
        device_type: ``"cuda"`` or ``"cpu"``.
        available: Bytes that the device has.
        asked: What was pinned of the step.
        recomputes: Whether layers are to be recomputed; ``None`` leaves that to memory.
        shards: Over how many ranks of a machine the base is spread.
    """
    trained = shape.count_adapter(adapter)
    weights = shape.count_weights(quantization, item_bytes, shards)
    runtime = int(_RUNTIME_BYTES.get(device_type, 0.9 * _GIB))
    free = max(0, available - runtime - weights - 4 * trained)
    if recomputes is not None and asked.checkpointing == "auto":
        asked = _pin(asked, "full" if recomputes else "none")
    memory = make_memory_model(
        shape, trained, item_bytes, has_triton=device_type == "cuda", quantization=quantization,
        state_bytes=count_state_bytes(optimizer),
    )  # fmt: skip
    states = memory.optimizer - 4 * trained
    common: dict[str, Any] = {
        "weights": weights,
        # In float32, and their gradients; what is copied of them, and scales, beside them.
        "adapters": 8 * trained + memory.standing,
        "optimizer": states,
        "runtime": runtime,
    }
    if shape.obstacle is not None or asked.enabled is False:
        return _forecast_trl(memory, shape, step, item_bytes, recomputes, common, available)
    plan = resolve_plan(
        asked,
        memory,
        device_type=device_type,
        free_bytes=free,
        step_tokens=step.largest,
        longest=step.longest,
        usual_tokens=step.usual,
        is_quantized=quantization is not None,
        supports_graphs=False,
        shards=shards,
    )
    tokens = max(min(plan.micro_batch_tokens, step.largest), step.longest)
    logits = min(plan.loss_chunk_tokens, tokens) * memory.loss_per_token
    kept = memory.dequantized if plan.caches_weights else 0
    return MemoryForecast(
        **common,
        activations=plan.predicted_bytes - memory.hold(caches=plan.caches_weights) - logits,
        dequantized=kept,
        logits=logits,
        available=available,
        plan=plan,
    )


def make_memory_model(
    shape: ModelShape,
    trained: int,
    item_bytes: int,
    *,
    has_triton: bool,
    quantization: str | None,
    state_bytes: int = 8,
) -> MemoryModel:
    """What a step takes, as the native engine counts it in a loaded model."""
    return MemoryModel.of_layers(
        layers=shape.layers,
        hidden=shape.hidden,
        queries=shape.heads * shape.head_dim,
        keys=shape.kv_heads * shape.head_dim,
        intermediate=shape.intermediate,
        post_norms=shape.post_norms,
        routed=shape.routed,
        capped_heads=shape.capped_heads,
        item_bytes=item_bytes,
        vocabulary=shape.vocabulary,
        has_triton=has_triton,
        dequantized=0 if quantization is None else shape.dequantized * item_bytes,
        largest_group=shape.largest_group * item_bytes,
        # Values in the dtype that is computed in, gradients in float32.
        copies=trained * (item_bytes + 4),
        # A float32 number for each block of 64.
        scales=shape.dequantized // 16 if quantization in ("nf4", "fp4") else 0,
        trained=trained,
        state_bytes=state_bytes,
    )


def _forecast_trl(
    memory: MemoryModel,
    shape: ModelShape,
    step: StepShape,
    item_bytes: int,
    recomputes: bool | None,
    common: dict[str, Any],
    available: int,
) -> MemoryForecast:
    """The same for TRL and peft, more coarsely: padded rows, and logits of all of them."""
    tokens = step.rows * step.longest
    checkpointed = 0 if recomputes is False else memory.layers
    kept = (memory.layers - checkpointed + bool(checkpointed)) * memory.saved_per_token
    # peft keeps its own copies of inputs in float32 for every adapted layer.
    kept = 2 * kept + memory.layers * memory.boundary_per_token + 2 * memory.transient_per_token
    return MemoryForecast(
        **common,
        activations=tokens * kept,
        dequantized=2 * memory.largest_group,
        # Scores in 16 bits, again in float32, and the gradient.
        logits=tokens * shape.vocabulary * (2 * item_bytes + 4),
        available=available,
    )


def _pin(asked: FastPlan, checkpointing: Any) -> FastPlan:
    return replace(asked, checkpointing=checkpointing)
