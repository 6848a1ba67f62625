"""Every way to start several processes, to lose one, and to go on with another number of them.

Each launcher runs here as it is, on a CPU, but for Slurm's: its variables are set by hand.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import train_on_ranks
from checkpoints import make_checkpoint

HELPER = Path(train_on_ranks.__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

#: Effective batches of four rows, on any number of processes.
FOUR: dict[str, Any] = {"gradient_accumulation_steps": 1, "plan": {"compile": False}}
#: Of six.
SIX: dict[str, Any] = {"gradient_accumulation_steps": 2, "plan": {"compile": False}}
WHOLE: dict[str, dict[str, Any]] = {
    "four": {**FOUR, "per_device_train_batch_size": 4},
    "saving": {**FOUR, "per_device_train_batch_size": 4, "output_dir": "saved",
               "save_strategy": "steps", "save_steps": 3},
    "six": {**SIX, "per_device_train_batch_size": 3, "rows": 7, "sample_prompts": ["hello world"],
            "sample_steps": 3},
    "six-trl": {**SIX, "per_device_train_batch_size": 3, "rows": 7, "plan": False},
    "six-16-bit": {**SIX, "per_device_train_batch_size": 3, "rows": 7, "load_in_4bit": False},
}  # fmt: skip
TWO = {"four": {**FOUR, "per_device_train_batch_size": 2}}


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    paths = [str(HELPER.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        command,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(paths), **environment,
        },
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    try:
        said = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "".join(said)[-6000:]
    return said


def make_arguments(base: Path, folder: Path, runs: dict[str, dict[str, Any]]) -> list[str]:
    return [str(HELPER), str(base), str(folder), json.dumps(runs)]


def read(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def find_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    folder = tmp_path_factory.mktemp("alone")
    train_on_ranks.main(str(base), str(folder), WHOLE)
    return folder


@pytest.fixture(scope="module")
def together(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two, whose checkpoints are gone on from."""
    folder = tmp_path_factory.mktemp("together")
    runs = {"saving": {**WHOLE["saving"], "per_device_train_batch_size": 2}}
    finish(start([*TORCHRUN, "--standalone", "--nproc-per-node=2",
                  *make_arguments(base, folder, runs)]))  # fmt: skip
    return folder


def compare(found: dict[str, Any], expected: dict[str, Any], after: int = 0) -> None:
    assert found["losses"] == pytest.approx(expected["losses"][after:], rel=1e-5)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-5)


def test_three_ranks(base: Path, alone: Path, tmp_path: Path) -> None:
    """Also through TRL, in 16 bits, with uneven shares, and a rank with no trained token."""
    runs = {
        name: {**run, "per_device_train_batch_size": 1}
        for name, run in WHOLE.items() if name.startswith("six")
    }  # fmt: skip
    # Owners of three layers are one each.
    runs["sharded"] = {**runs["six"], "shard": True, "plan": {"shard": True, "compile": False}}
    # One rank runs out of memory in the middle of a step, which all compute again.
    runs["sharded-short"] = {**runs["sharded"], "runs_out": True}
    (said,) = finish(start([*TORCHRUN, "--standalone", "--nproc-per-node=3",
                            *make_arguments(base, tmp_path, runs)]))  # fmt: skip
    assert "Memory ran out in a step" in said
    for name, run in runs.items():
        expected = read(alone, "six" if "sharded" in name else name)
        first, *others = (read(tmp_path, name, rank) for rank in range(3))
        compare(first, expected)
        assert first["tokens"] == expected["tokens"]
        # Asked before, during and after, for which a sharded base is brought together.
        assert first["samples"] == expected["samples"]
        assert len(first["samples"]) == (3 if "sample_prompts" in run else 0)
        for other in others:
            assert other["losses"] == first["losses"]
            for key, value in first["weights"].items():
                assert torch.equal(other["weights"][key], value), (name, key)
    assert read(tmp_path, "sharded")["held"] < 0.36 * read(tmp_path, "six")["held"]


def test_two_nodes(base: Path, alone: Path, tmp_path: Path) -> None:
    """The base is sharded within each, and the gradients are added up over both."""
    runs = {"four": {**FOUR, "per_device_train_batch_size": 1, "shard": True,
                     "plan": {"shard": True, "compile": False}}}  # fmt: skip
    port = find_port()
    finish(*(
        start([*TORCHRUN, "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2",
               "--master-addr=127.0.0.1", f"--master-port={port}",
               *make_arguments(base, tmp_path, runs)])
        for node in (0, 1)
    ))  # fmt: skip
    found = [read(tmp_path, "four", rank) for rank in range(4)]
    compare(found[0], read(alone, "four"))
    # Three layers over two ranks of a node.
    held = [one["held"] for one in found]
    assert held[0] == held[2] > held[1] == held[3]
    for key, value in found[0]["weights"].items():
        assert all(torch.equal(one["weights"][key], value) for one in found)


def test_accelerate_launch(base: Path, alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
               "--dynamo_backend=no", f"--main_process_port={find_port()}"]  # fmt: skip
    finish(start([*command, *make_arguments(base, tmp_path, TWO)]))
    for rank in (0, 1):
        compare(read(tmp_path, "four", rank), read(alone, "four"))


def test_srun(base: Path, alone: Path, tmp_path: Path) -> None:
    """What srun sets, as Slurm's documentation has it; there is no Slurm here."""
    said = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": find_port(), "SLURM_NODEID": "0",
    }  # fmt: skip
    finish(*(
        start([sys.executable, *make_arguments(base, tmp_path, TWO)], **said,
              SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in (0, 1)
    ))  # fmt: skip
    for rank in (0, 1):
        compare(read(tmp_path, "four", rank), read(alone, "four"))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_across_world_sizes(
    request: pytest.FixtureRequest, base: Path, alone: Path, tmp_path: Path, before: int, after: int
) -> None:
    source = request.getfixturevalue("alone" if before == 1 else "together")
    run = {
        **FOUR,
        "per_device_train_batch_size": 4 // after,
        "resume_from_checkpoint": str(source / "saved" / "checkpoint-3"),
    }
    arguments = make_arguments(base, tmp_path, {"resumed": run})
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={after}"] if after > 1 else [
        sys.executable
    ]  # fmt: skip
    finish(start([*command, *arguments]))
    for rank in range(after):
        compare(read(tmp_path, "resumed", rank), read(alone, "four"), after=3)


def test_a_killed_worker_is_started_again_and_goes_on(
    base: Path, alone: Path, tmp_path: Path
) -> None:
    run = {**FOUR, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2,
           "resume_from_checkpoint": "auto", "dies": True, "shard": True,
           "plan": {"shard": True, "compile": False}}  # fmt: skip
    finish(start([*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1",
                  *make_arguments(base, tmp_path, {"restarted": run})]))  # fmt: skip
    for rank in (0, 1):
        found = read(tmp_path, "restarted", rank)
        # Of the second start, from the last checkpoint on.
        compare(found, read(alone, "four"), after=4)


def test_a_killed_rank_ends_the_others(base: Path, tmp_path: Path) -> None:
    run = {**FOUR, "per_device_train_batch_size": 2, "max_steps": 100_000,
           "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    process = start([*TORCHRUN, "--standalone", "--nproc-per-node=2",
                     *make_arguments(base, tmp_path, {"long": run})])  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run-long").glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    workers = [
        child for child in psutil.Process(process.pid).children()
        if any("train_on_ranks" in word for word in child.cmdline())
    ]  # fmt: skip
    os.kill(workers[-1].pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
