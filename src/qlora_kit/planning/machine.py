"""This machine as a card: its memory, and the speed of one large product on it."""

from __future__ import annotations

import time
from typing import Final

from qlora_kit.device import choose_compute_dtype, get_device, get_device_name, to_torch_dtype
from qlora_kit.forecast import Card

__all__ = ["measure_machine"]

#: Width of the product that is timed.
_WIDTH: Final = {"cuda": 8192, "cpu": 1024}


def measure_machine() -> Card:
    """The device that models are put on here, with its speed as measured in a moment."""
    import psutil
    import torch

    device = get_device()
    if device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0])
    else:
        memory = int(psutil.virtual_memory().available)
    return Card(
        name=get_device_name(device),
        memory_bytes=memory,
        teraflops=_measure_speed(device.type),
        source="measured",
        kind="cuda" if device.type == "cuda" else "cpu",
    )


def _measure_speed(kind: str) -> float:
    """The best of a few products, in 10^12 floating-point operations a second."""
    import torch

    device = get_device()
    width = _WIDTH.get(kind, 2048)
    dtype = to_torch_dtype(choose_compute_dtype(None, device))
    one = torch.ones(width, width, dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        done = one @ one
        # Reading a number waits for the device.
        float(done[0, 0])
        best = max(best, 2 * width**3 / (time.perf_counter() - started) / 1e12)
    return best
