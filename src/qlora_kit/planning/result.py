"""What a plan says, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from qlora_kit.forecast import Card, MemoryForecast

__all__ = ["TrainingForecast"]

_GIB: Final = 1024**3

_WORDS: Final = {
    "weights": "base weights",
    "adapters": "adapters, float32, and gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "dequantized": "dequantized weights",
    "logits": "logits",
    "runtime": "the process itself",
}


@dataclass(frozen=True, repr=False)
class TrainingForecast:
    """What a training will take.

    Attributes:
        model: The model.
        device: The card it was planned for.
        quantization: How the base is held.
        parameters: Parameters of the base.
        trainable_parameters: Parameters that train.
        memory: Memory by part.
        rows: Rows of the data.
        row_tokens: Tokens of the longest row.
        step_tokens: Tokens of an average step.
        steps: Optimizer steps.
        seconds: Seconds of all steps, roughly; ``None`` where no speed is known.
        disk: Bytes by what writes them.
        remedies: What would make it fit; empty where it fits.
        notes: What the numbers rest on.
        ranks: Cards of one machine that train together; memory is that of each.
        is_sharded: Whether the base is spread over them in what was planned.
        other_memory: Memory by part with the base held the other way, ``None`` where it is not to
            be, or cannot be, sharded.
    """

    model: str
    device: Card
    quantization: str | None
    parameters: int
    trainable_parameters: int
    memory: MemoryForecast
    rows: int
    row_tokens: int
    step_tokens: int
    steps: int
    seconds: float | None
    disk: Mapping[str, int]
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ranks: int = 1
    is_sharded: bool = False
    other_memory: MemoryForecast | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all cards together, roughly; ``None`` where no speed is known."""
        if not self.seconds:
            return None
        return self.steps * self.step_tokens * self.ranks / self.seconds

    @property
    def fits(self) -> bool:
        """Whether the training fits the device."""
        return self.memory.fits

    def describe(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "model": self.model,
            "device": self.device.name,
            "device_memory_gib": round(self.device.memory_gib, 2),
            "quantization": self.quantization,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "memory": self.memory.describe(),
            "plan": None if self.memory.plan is None else str(self.memory.plan),
            "fits": self.fits,
            "remedies": list(self.remedies),
            "rows": self.rows,
            "row_tokens": self.row_tokens,
            "step_tokens": self.step_tokens,
            "steps": self.steps,
            "seconds": None if self.seconds is None else round(self.seconds),
            "disk_bytes": dict(self.disk),
            "notes": list(self.notes),
            "ranks": self.ranks,
            "sharded": self.is_sharded,
            "other_memory": None if self.other_memory is None else self.other_memory.describe(),
            "tokens_per_second": (
                None if self.tokens_per_second is None else round(self.tokens_per_second)
            ),
        }

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"TrainingForecast({self.model!r}, {self.memory.total / _GIB:.2f} GiB, {verdict} "
            f"{self.device.name!r})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        memory = self.memory
        held = self.quantization or "not quantized"
        lines = [
            f"{self.model}: {self.parameters / 1e9:.2f} billion parameters, {held}; "
            f"{self.trainable_parameters:,} train",
            f"on {f'{self.ranks} x ' if self.ranks > 1 else ''}{self.device.name}, "
            f"{self.device.memory_gib:.1f} GiB{' each' if self.ranks > 1 else ''}",
            "",
        ]
        lines += [
            f"  {_WORDS[name]:<34} {size / _GIB:6.2f} GiB" for name, size in memory.parts.items()
        ]
        verdict = "fits" if self.fits else "does NOT fit"
        lines += [f"  {'peak':<34} {memory.total / _GIB:6.2f} GiB   {verdict}", ""]
        if self.other_memory is not None:
            ways = ("sharded over them", "whole on each card")
            chosen, other = ways if self.is_sharded else ways[::-1]
            fits = "" if self.other_memory.fits else ", which does not fit"
            lines += [
                f"The base {chosen}; {other} it would be "
                f"{self.other_memory.total / _GIB:.2f} GiB a card{fits}.",
                "",
            ]
        if self.remedies:
            lines += ["What would make it fit:", *(f"  {one}" for one in self.remedies), ""]
        plan = memory.plan
        if plan is not None:
            lines.append(
                f"Steps: micro-batches of up to {plan.micro_batch_tokens:,} tokens, checkpointing "
                f"{plan.checkpointing}"
            )
        lines.append(
            f"{self.steps:,} steps of about {self.step_tokens * self.ranks:,} tokens; the longest "
            f"row has {self.row_tokens:,}"
        )
        if self.seconds is not None:
            lines.append(
                f"Time: roughly {_say_time(self.seconds)}, from the device's {self.device.source} "
                f"speed of {self.device.teraflops:.3g} TFLOP/s, starting and compiling apart"
            )
        if self.ranks > 1 and self.tokens_per_second is not None:
            lines.append(f"About {self.tokens_per_second:,.0f} tokens a second, all cards together")
        if self.disk:
            sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in self.disk.items())
            lines.append(f"Disk: {sizes}")
        lines += self.notes
        return "\n".join(lines)


def _say_time(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    if seconds < 7200:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
