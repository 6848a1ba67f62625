"""The lines of the training benchmark, and what the hardware could do at most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Dense bfloat16 TFLOP/s that matrix products of these sizes reach, by a part of the card's name.
_TFLOPS = {"H200": 790, "H100": 790, "A100": 280, "L40S": 330, "RTX 4090": 160}


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        name: What it is called in the table.
        engine: ``"trl"``, ``"unsloth"`` or ``"ours"``.
        batch: Rows per device.
        accumulation: Gradient accumulation steps.
        packed: Tokens per packed row; 0 for one example per row.
        checkpointing: Passed to the peer, or pinned in our plan; ``None`` leaves it open.
        plan: Our plan's other options.
        devices: Device types it runs on.
        steps: Overrides the number of steps.
        filled: Rows are single examples of this many tokens, one text behind the other.
        profile: Whether to record kernels.
        dtype: Overrides what is computed in.
    """

    name: str
    engine: str
    batch: int
    accumulation: int
    packed: int = 0
    checkpointing: Any = None
    plan: dict[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda", "cpu")
    steps: int = 0
    filled: int = 0
    profile: bool = False
    dtype: str | None = None


_GPU = ("cuda",)
_CPU = ("cpu",)

ROWS = (
    Row("trl-classic", "trl", 2, 4, checkpointing=True, devices=_GPU),
    Row("trl-classic-cpu", "trl", 2, 4, checkpointing=False, devices=_CPU),
    Row("unsloth-classic", "unsloth", 2, 4, checkpointing="unsloth", devices=_GPU),
    Row("unsloth-classic-cpu", "unsloth", 2, 4, checkpointing=False, devices=_CPU),
    Row("ours-classic", "ours", 2, 4),
    Row("ours-classic-float16", "ours", 2, 4, devices=_GPU, dtype="float16"),
    Row("ours-classic-nf4", "ours", 2, 4, plan={"weights": "nf4"}),
    Row("ours-classic-eager", "ours", 2, 4, plan={"compile": False, "cuda_graphs": False}),
    Row("ours-classic-no-graphs", "ours", 2, 4, plan={"cuda_graphs": False}, devices=_GPU),
    Row("unsloth-8x1", "unsloth", 8, 1, checkpointing=False, devices=_GPU),
    Row("trl-packed-2x4x2048", "trl", 2, 4, 2048, checkpointing=True, devices=_GPU),
    Row("unsloth-packed-2x4x2048", "unsloth", 2, 4, 2048, checkpointing="unsloth", devices=_GPU),
    Row("unsloth-packed-8x2048", "unsloth", 8, 1, 2048, checkpointing=False, devices=_GPU),
    Row(
        "ours-packed-4x4096-full", "ours", 1, 4, 4096, "full",
        {"micro_batch_tokens": 4096, "weights": "nf4"}, devices=_GPU,
    ),
    Row("ours-packed-16384-full", "ours", 1, 1, 16384, "full", {"weights": "nf4"}, devices=_GPU),
    Row("ours-packed-16384-none", "ours", 1, 1, 16384, "none", {"weights": "nf4"}, devices=_GPU),
    Row(
        "ours-packed-16384-none-cache", "ours", 1, 1, 16384, "none", {"weights": "cache"},
        devices=_GPU,
    ),
    Row(
        "ours-packed-16384-none-graphs", "ours", 1, 1, 16384, "none",
        {"weights": "cache", "cuda_graphs": True}, devices=_GPU,
    ),
    Row(
        "ours-packed-16384-half", "ours", 1, 1, 16384, "selective",
        {"weights": "nf4", "checkpointed_layers": 18}, devices=_GPU,
    ),
    *(
        Row(f"{engine}-{length // 1024}k", engine, 1, 1, 0, checkpointing, plan,
            devices=_GPU, steps=4, filled=length)
        for length in (32768, 131072)
        for engine, checkpointing, plan in (
            ("ours", "full", {"weights": "nf4"}), ("unsloth", "unsloth", {}),
        )
    ),
    Row(
        "profile-packed-16384-none", "ours", 1, 1, 16384, "none", {"weights": "nf4"},
        devices=_GPU, steps=8, profile=True,
    ),
    Row("profile-classic", "ours", 2, 4, devices=_GPU, steps=24, profile=True),
)  # fmt: skip


def select_rows(names: list[str] | None, device_type: str) -> list[Row]:
    """The lines asked for, or all that are meant for a device, profiles excepted."""
    if names:
        known = {row.name: row for row in ROWS}
        return [known[name] for name in names]
    return [row for row in ROWS if device_type in row.devices and not row.profile]


def arithmetic_limit(facts: dict[str, Any]) -> float | None:
    """Tokens/s if every parameter took 4 FLOP per token (frozen weights) and nothing else time."""
    for name, tflops in _TFLOPS.items():
        if name in facts["device"]:
            return float(tflops * 1e12 / (4 * facts["parameters"]))
    return None
