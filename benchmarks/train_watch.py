"""Watching a trainer from outside: seconds, tokens, losses and kernels of each step."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

#: Kernel groups by a part of the kernel's name, the first match counting.
_GROUPS = (
    ("attention", ("flash", "fmha", "attention", "attn")),
    ("dequantize", ("dequant", "quantize_blockwise")),
    ("optimizer", ("adam", "optimizer", "multi_tensor", "foreach")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv")),
    ("compiled pointwise and norms", ("triton",)),
    ("copies and fills", ("memcpy", "memset", "copy", "fill", "cat")),
)


class Watch:
    """Seconds and tokens per step."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.steps: list[tuple[float, int]] = []
        #: Processor seconds of all threads, which other processes do not stretch.
        self.processor_seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: Any = 0
        #: Tokens so far as the trainer logs them, where nobody counts them here.
        self.logged_tokens = 0
        self.plan: str | None = None
        self._last = self._last_processor = 0.0
        self.callback = _Callback(self)

    def start(self) -> None:
        self._last, self._last_processor = time.perf_counter(), time.process_time()

    def end_step(self) -> None:
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
        now = time.perf_counter()
        self.steps.append((now - self._last, int(self.tokens)))
        self._last, self.tokens = now, 0
        processor = time.process_time()
        self.processor_seconds.append(processor - self._last_processor)
        self._last_processor = processor

    def take_logged_tokens(self, total: int) -> None:
        """Fill in the last step's tokens from the trainer's running total."""
        seconds, tokens = self.steps[-1]
        if tokens == 0:
            self.steps[-1] = (seconds, total - self.logged_tokens)
        self.logged_tokens = total


class _Callback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._watch.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._watch.losses.append(float(logs["loss"]))
            self._watch.take_logged_tokens(int(logs.get("num_tokens", 0)))


def count_tokens(trainer: Any, watch: Watch) -> None:
    """Count tokens, padding excluded, as micro-batches reach ``training_step``."""
    inner = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            watch.tokens = watch.tokens + mask.sum()
        else:
            watch.tokens = watch.tokens + inputs["input_ids"].numel()
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = training_step


def profile_steps(run: Any, watch: Watch, job: dict[str, Any]) -> dict[str, Any]:
    """Train with the last steps under torch's profiler; milliseconds per step by kernel group."""
    from torch.profiler import ProfilerActivity, profile, schedule

    active = 3
    wait = job["steps"] - active - 1
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
        schedule=schedule(wait=wait, warmup=1, active=active, repeat=1),
    ) as profiler:

        class Step(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                profiler.step()

        run(watch, [Step()])
    groups: dict[str, float] = {}
    kernels: list[tuple[float, int, str]] = []
    for event in profiler.key_averages():
        milliseconds = getattr(event, "self_device_time_total", 0.0) / 1000 / active
        if milliseconds <= 0 or not _is_kernel(event):
            continue
        name = event.key.lower()
        group = next((g for g, parts in _GROUPS if any(p in name for p in parts)), "other")
        groups[group] = groups.get(group, 0.0) + milliseconds
        kernels.append((milliseconds, event.count // active, event.key[:140]))
    kernels.sort(reverse=True)
    idle, gaps = _measure_idle(profiler.events())
    groups["nothing"] = idle / active
    return {
        "groups_ms_per_step": {
            k: round(v, 2) for k, v in sorted(groups.items(), key=lambda x: -x[1])
        },
        "kernels": [f"{ms:9.3f} ms {count:5d} x {name}" for ms, count, name in kernels[:60]],
        "longest_gaps": gaps,
    }


def _is_kernel(event: Any) -> bool:
    """Whether an event ran on the GPU; ranges that mark a step or an optimizer did not."""
    is_range = getattr(event, "is_user_annotation", False) or event.key.startswith(
        ("ProfilerStep", "Optimizer.")
    )
    return "cuda" in str(event.device_type).lower() and not is_range


def _measure_idle(events: Any) -> tuple[float, list[str]]:
    """Milliseconds between the first and the last kernel in which none ran, and the longest."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.key[:60])
        for event in events
        if _is_kernel(event)
    )
    idle, gaps = 0.0, []
    reached, before = kernels[0][1], kernels[0][2]
    for start, end, name in kernels:
        if start > reached:
            idle += start - reached
            gaps.append((start - reached, before, name))
        if end > reached:
            reached, before = end, name
    longest = sorted(gaps, reverse=True)[:12]
    return idle / 1000, [f"{gap / 1000:.2f} ms: {a} -> {b}" for gap, a, b in longest]
