"""Several processes train one model: the same numbers, one result, one stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_on_ranks
from qlora_kit import ranks
from qlora_kit.engines.rank_rows import RankBatches, split_by_tokens
from qlora_kit.errors import ConfigError, DestinationExistsError

HELPER = Path(train_on_ranks.__file__)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)

SHARED: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
          "per_device_eval_batch_size": 2, "eval_steps": 6, "evaluates": True}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "fast!": SHARED,
    "trl": {**SHARED, "plan": False},
    "packed": {**SHARED, "packing": True, "max_length": 64, "load_in_4bit": False},
    # One row in the last effective batch: a rank has none.
    "few": {**SHARED, "rows": 5, "per_device_train_batch_size": 1},
    # A head's gradient is gathered, a norm's is autograd's; both outside of the adapter copies.
    "dora": {
        **SHARED,
        "rows": 5,
        "use_dora": True,
        "max_steps": 2,
        "modules_to_save": ["lm_head", "norm"],
    },
    "saving": {**SHARED, "save_strategy": "steps", "save_steps": 3, "output_dir": "saved"},
    "stopped": {**SHARED, "stops": True},
}


def launch(world: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={world}", str(HELPER), *arguments]  # fmt: skip
    return subprocess.Popen(
        command,
        env={
            **os.environ, "OMP_NUM_THREADS": "1",
            # On every machine alike: two processes on one GPU cannot talk through NCCL.
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(HELPER.parent), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def read(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone_and_together(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same runs in one process and in two."""
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    process = launch(2, str(tiny_llama), str(together), json.dumps(RUNS))
    whole = {
        name: {**run, "per_device_train_batch_size": 2 * run["per_device_train_batch_size"]}
        for name, run in RUNS.items() if name != "stopped"
    }  # fmt: skip
    try:
        if torch.cuda.is_available():
            # The two run on the CPU, so this one does; elsewhere this process need not start anew.
            one = launch(1, str(tiny_llama), str(alone), json.dumps(whole))
            _, errors = one.communicate(timeout=600)
            assert one.returncode == 0, errors[-5000:]
        else:
            train_on_ranks.main(str(tiny_llama), str(alone), whole)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-5000:]
    return alone, together


@pytest.mark.parametrize("name", ["fast", "trl", "packed", "few", "dora"])
def test_two_ranks_train_as_one(alone_and_together: Any, name: str) -> None:
    alone, together = alone_and_together
    expected = read(alone, name)
    assert ("TRL" in expected["plan"]) == (name == "trl")
    first, second = (read(together, name, rank) for rank in (0, 1))
    for found in (first, second):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert found["tokens"] == expected["tokens"]
        for (step, loss), (its_step, its_loss) in zip(found["eval"], expected["eval"], strict=True):
            assert step == its_step
            assert loss == pytest.approx(its_loss, rel=1e-6)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=1e-6)
        assert torch.equal(first["weights"][key], second["weights"][key]), key


def test_evaluation_does_not_depend_on_the_layout(alone_and_together: Any) -> None:
    """A mean of batch means would: the fast step and TRL see other batches."""
    alone, _ = alone_and_together
    fast, trl = read(alone, "fast")["eval"], read(alone, "trl")["eval"]
    assert [loss for _, loss in fast] == pytest.approx([loss for _, loss in trl], rel=1e-6)


def test_one_export_one_manifest(alone_and_together: Any) -> None:
    _, together = alone_and_together
    counts = [read(together, "fast", rank)["exported"] for rank in (0, 1)]
    assert counts[0] == counts[1] > 0
    assert (together / "exported" / "qlora_kit_manifest.json").is_file()
    assert (together / "run-fast" / "qlora_kit_manifest.json").is_file()


def test_a_signal_to_one_rank_stops_all_at_one_step(alone_and_together: Any) -> None:
    _, together = alone_and_together
    for rank in (0, 1):
        found = read(together, "stopped", rank)
        assert found["interrupted"]
        assert found["steps"] == 2
        assert found["checkpoint"].endswith("checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_across_world_sizes(
    alone_and_together: Any, tiny_llama: Path, tmp_path: Path, before: int, after: int
) -> None:
    source = alone_and_together[0 if before == 1 else 1]
    run = {
        **SHARED,
        "per_device_train_batch_size": 4 // after,
        "resume_from_checkpoint": str(source / "saved" / "checkpoint-3"),
    }
    process = launch(after, str(tiny_llama), str(tmp_path), json.dumps({"resumed": run}))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-5000:]
    expected, found = read(alone_and_together[0], "fast"), read(tmp_path, "resumed")
    assert found["losses"] == pytest.approx(expected["losses"][3:], rel=1e-5)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    run = {**SHARED, "max_steps": 100_000, "save_strategy": "steps", "save_steps": 1}
    process = launch(2, str(tiny_llama), str(tmp_path), json.dumps({"long": run}))
    import psutil

    deadline = time.monotonic() + 120
    while not list((tmp_path / "run-long").glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    workers = [
        child for child in psutil.Process(process.pid).children()
        if any("train_on_ranks" in word for word in child.cmdline())
    ]  # fmt: skip
    os.kill(workers[-1].pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_splits_by_tokens_longest_first() -> None:
    assert split_by_tokens([9, 1, 1, 7, 1, 1], 2, None) == [[0, 4], [1, 2, 3, 5]]
    assert split_by_tokens([9, 1, 1, 1, 1, 1], 2, 3) == [[0, 4, 5], [1, 2, 3]]
    assert split_by_tokens([5], 3, None) == [[0], [], []]


@pytest.mark.parametrize("fills", [True, False])
def test_every_row_goes_to_one_rank(fills: bool) -> None:
    lengths = [1 + n * 7 % 23 for n in range(23)]
    seen: list[int] = []
    for rank in range(3):
        batches = RankBatches(
            range(23), lengths, rows=2, accumulation=2, place=ranks.Place(rank, 3, rank),
            seed=1, drops_last=False, fills=fills,
        )  # fmt: skip
        taken = list(batches)
        assert len(taken) == len(batches) == 4
        if fills:
            assert all(1 <= len(rows) <= 2 for rows in taken)
        seen += [row for rows in taken for row in rows if row >= 0]
    assert sorted(seen) == list(range(23))


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        # A batch script itself is one process, however many tasks it asked for.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_place(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: tuple[int, ...]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.find_place() == place


def test_one_card_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.choose_card(4, current=0) == 2
    assert ranks.choose_card(1, current=0) == 0
    with pytest.raises(ConfigError, match="Process 2 of this machine has no card: it has 2"):
        ranks.choose_card(2, current=0)
    monkeypatch.setenv("WORLD_SIZE", "eight")
    with pytest.raises(ConfigError, match="WORLD_SIZE='eight'"):
        ranks.find_place()


def test_errors_travel_with_their_kind() -> None:
    import pickle

    error = pickle.loads(ranks._pickle(DestinationExistsError("it is there")))
    assert isinstance(error, DestinationExistsError)
    unpicklable = pickle.loads(ranks._pickle(OSError(lambda: None)))
    assert "On the main rank: OSError" in str(unpicklable)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3-7,9]", "n3"), ("n[07,9]", "n07"), ("a,n[1-2]", "a")],
)
def test_first_node(nodes: str, first: str) -> None:
    assert ranks._first_node(nodes) == first
