"""Threads of a run on a CPU that other work shares: no more than there are cores left for.

A step's threads meet at thousands of barriers. Where other work keeps one of them from its core,
the others spin until it gets there, a time slice at each, and a step takes ten times as long and
more; on one thread it takes its share of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from transformers import TrainerCallback

if TYPE_CHECKING:
    import torch

__all__ = ["SharedCores", "choose_threads", "measure_other_cores"]

logger = logging.getLogger(__name__)

#: Who sets one of these has chosen.
_PINS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_FIRST_LOOK_SECONDS: Final = 0.25
#: Between looks. Compiled layers are compiled again for each number of threads.
_SECONDS_BETWEEN: Final = 20.0
#: Cores' worth of work beside a run that an idle machine has anyway.
_USUAL: Final = 0.3


def choose_threads(most: int, cores: int, others: float) -> int:
    """The number of threads: ``most``, or a half, a quarter, ... of it.

    Args:
        most: How many there are where nothing else runs.
        cores: The machine's cores.
        others: Cores' worth of work that other processes do.
    """
    left = cores - max(0.0, others - _USUAL)
    threads = most
    while threads > 1 and threads > left:
        threads //= 2
    return threads


class SharedCores(TrainerCallback):
    """Gives threads up while other work needs the cores, and takes them back afterwards.

    Args:
        device: Where the run computes; nothing is done but on a CPU.
        measure: Returns how many cores' worth of work others did since it was last called.
    """

    def __init__(self, device: torch.device, measure: Callable[[], float] | None = None) -> None:
        import torch

        self._most = torch.get_num_threads()
        self._cores = _count_cores()
        self._is_on = (
            device.type == "cpu"
            and self._most > 1
            and self._cores is not None
            and not any(os.environ.get(name) for name in _PINS)
        )
        self._measure = measure or measure_other_cores()
        self._looked = time.monotonic()
        self._was_said = False

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """While a run lasts; the number of threads is as it was afterwards."""
        import torch

        try:
            if self._is_on:
                time.sleep(_FIRST_LOOK_SECONDS)
                self._look()
            yield
        finally:
            if self._is_on and torch.get_num_threads() != self._most:
                torch.set_num_threads(self._most)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_on and time.monotonic() - self._looked >= _SECONDS_BETWEEN:
            self._look()

    def _look(self) -> None:
        import torch

        self._looked = time.monotonic()
        others = self._measure()
        assert self._cores is not None
        threads = choose_threads(self._most, self._cores, others)
        if threads == torch.get_num_threads():
            return
        torch.set_num_threads(threads)
        logger.log(
            logging.INFO if self._was_said else logging.WARNING,
            "Other work keeps %.1f of %d cores busy: this run takes %d of its %d threads, so that "
            "it slows down in proportion. OMP_NUM_THREADS pins the number.",
            others, self._cores, threads, self._most,
        )  # fmt: skip
        self._was_said = True


def measure_other_cores() -> Callable[[], float]:
    """A function that returns how many cores' worth of work others did since its last call."""
    import psutil

    own = psutil.Process()

    def read() -> tuple[float, float, float]:
        system, mine = psutil.cpu_times(), 0.0
        # Workers that load data or compile are of this run.
        for one in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                # Its own time, and that of children that have ended.
                mine += sum(one.cpu_times()[:4])
        idle = system.idle + getattr(system, "iowait", 0.0)
        # A guest's time is in user's already.
        guests = getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)
        return time.monotonic(), sum(system) - idle - guests, mine

    last = [read()]

    def measure() -> float:
        now = read()
        seconds, busy, mine = (new - old for new, old in zip(now, last[0], strict=True))
        last[0] = now
        return max(0.0, busy - mine) / max(seconds, 1e-3)

    return measure


def _count_cores() -> int | None:
    """The machine's cores, or ``None`` where this process may use only some of them."""
    count = os.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return count if count == allowed else None
