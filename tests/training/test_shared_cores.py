"""A CPU that other work shares: threads are given up in time, said, and taken back."""

import logging
import subprocess
import sys
import time

import pytest
import torch

from qlora_kit.training.shared_cores import SharedCores, choose_threads, measure_other_cores


@pytest.mark.parametrize(
    ("most", "cores", "others", "threads"),
    [(2, 2, 0.0, 2), (2, 2, 0.25, 2), (2, 2, 0.7, 1), (2, 2, 2.0, 1), (16, 16, 3.0, 8),
     (16, 16, 13.0, 2), (16, 16, 0.1, 16), (4, 16, 10.0, 4), (1, 8, 8.0, 1)],
)  # fmt: skip
def test_threads_are_no_more_than_the_cores_that_are_left(most, cores, others, threads):
    assert choose_threads(most, cores, others) == threads


@pytest.fixture
def two_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_run_gives_threads_up_says_so_once_and_takes_them_back(two_threads, caplog, monkeypatch):
    from qlora_kit.training import shared_cores

    monkeypatch.setattr(shared_cores, "_count_cores", lambda: 2)
    others = [2.0, 0.0, 2.0]
    cores = SharedCores(torch.device("cpu"), measure=lambda: others.pop(0))
    seen = []
    with caplog.at_level(logging.WARNING), cores.sharing():
        seen.append(torch.get_num_threads())
        # Not so soon again: compiled layers would be compiled anew.
        cores.on_step_end(None, None, None)
        for _ in range(2):
            monkeypatch.setattr(cores, "_looked", time.monotonic() - 60)
            cores.on_step_end(None, None, None)
            seen.append(torch.get_num_threads())
    assert seen == [1, 2, 1]
    assert others == []
    assert torch.get_num_threads() == 2
    assert caplog.text.count("Other work keeps 2.0 of 2 cores busy") == 1


@pytest.mark.parametrize("reason", ["pinned", "a card", "some cores"])
def test_a_number_of_threads_that_was_chosen_is_left_alone(two_threads, monkeypatch, reason):
    from qlora_kit.training import shared_cores

    monkeypatch.setattr(shared_cores, "_count_cores", lambda: None if reason == "some cores" else 2)
    if reason == "pinned":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    device = torch.device("cuda" if reason == "a card" else "cpu")
    with SharedCores(device, measure=lambda: 2.0).sharing():
        assert torch.get_num_threads() == 2


def test_work_of_other_processes_is_seen():
    measure = measure_other_cores()
    busy = "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    # Not a child: those are a run's own.
    start = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {busy!r}], start_new_session=True)"
    )
    subprocess.run([sys.executable, "-c", start], check=True)
    measure()
    time.sleep(0.5)
    assert measure() > 0.05
