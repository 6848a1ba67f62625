"""One command in several processes on this machine, one for each card.

They are started as torchrun starts its workers, and told apart by the same variables. A launcher of
its own, because a Ctrl-C has to reach each process once, and a checkpoint may take longer to save
than the half minute after which torchrun kills what it has interrupted.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from qlora_kit import ranks
from qlora_kit.cli.commands import INTERRUPTED
from qlora_kit.errors import ConfigError

__all__ = ["count_processes", "drop_flag", "read_count", "run_processes"]

_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
#: Seconds that the others get to end by themselves after one has failed.
_GRACE: Final = 10.0
_POLL: Final = 0.1


def count_processes(asked: str) -> int:
    """How many processes ``--nproc`` asks for: a number, or ``auto`` for one a card.

    Raises:
        ConfigError: When it is neither, or there are fewer cards.
    """
    import torch

    if ranks.find_place().world > 1:
        raise ConfigError(
            "A launcher has started this process already, as one of several. Leave out --nproc."
        )
    cards = int(torch.cuda.device_count())
    cores = os.cpu_count() or 1
    count = read_count(asked)
    if 0 < cards < count:
        raise ConfigError(
            f"--nproc {asked} asks for more processes than there are cards here: {cards}, one for "
            "each process."
        )
    if not cards and count > cores:
        raise ConfigError(
            f"--nproc {asked} asks for more processes than this machine has cores: {cores}, and it "
            "has no card."
        )
    return count


_MOST_DIGITS: Final = 9


def read_count(asked: str) -> int:
    """A number as it was typed, or ``auto`` for the cards of this machine.

    Raises:
        ConfigError: When it is neither.
    """
    import torch

    if asked == "auto":
        return max(1, int(torch.cuda.device_count()))
    # Python itself refuses to read numbers of thousands of digits.
    if not asked.isdecimal() or len(asked) > _MOST_DIGITS or int(asked) < 1:
        shown = asked if len(asked) <= _MOST_DIGITS else f"{asked[:_MOST_DIGITS]}..."
        raise ConfigError(f"--nproc takes a number of processes, or auto; got {shown!r}.")
    return int(asked)


def drop_flag(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments without a flag and its value."""
    kept, is_value = [], False
    for argument in arguments:
        if is_value or argument.startswith(f"{flag}="):
            is_value = False
        elif argument == flag:
            is_value = True
        else:
            kept.append(argument)
    return kept


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run this program in so many processes; the exit status of the first, or of one that failed.

    Only the first writes to standard output. A signal to this process reaches each of them once.

    Args:
        count: How many.
        arguments: The command's.
    """
    port = _choose_port()
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarding(processes):
        processes.extend(_start(rank, count, port, arguments) for rank in range(count))
        failed = _wait(processes)
    return failed or processes[0].returncode


def _start(rank: int, count: int, port: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    cores = os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        **os.environ,
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", *arguments],
        env=environment,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        # Away from the terminal's Ctrl-C, which would reach them beside the one sent on from here.
        start_new_session=True,
    )


def _choose_port() -> int:
    """A port of this machine that is free."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The status of the first to fail, whereupon the others are ended; 0 when none did."""
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(_POLL)
        if not failed:
            # An interrupted one stopped at the same step as the others, which end by themselves.
            ended = [p.returncode for p in processes if p.returncode not in (None, 0, INTERRUPTED)]
            # As a shell has it: 128 and the signal that ended the process.
            failed = 0 if not ended else ended[0] if ended[0] > 0 else 128 - ended[0]
            deadline = time.monotonic() + _GRACE if failed else deadline
        elif time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
    return failed


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Send signals on to the processes meanwhile."""

    def forward(number: int, frame: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
