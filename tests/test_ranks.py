"""Several processes train one model: the same numbers, one result, one stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import train_on_ranks
from checkpoints import make_checkpoint
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
# One row in the last effective batch, so that a rank has none.
FEW: dict[str, Any] = {**SHARED, "rows": 5, "per_device_train_batch_size": 1, "max_steps": 4,
                       "eval_steps": 4}  # fmt: skip
# Ranks have different numbers of micro-batches.
PARTS: dict[str, Any] = {**SHARED, "packing": True, "max_length": 64, "load_in_4bit": False,
                         "max_steps": 2, "eval_steps": 2}  # fmt: skip
#: Of a base with so many layers that they come and go; only in two processes.
DEEP: dict[str, dict[str, Any]] = {
    "whole": {**FEW, "plan": {"checkpointing": "none"}},
    "sharded": {
        **FEW,
        "shard": True,
        "plan": {"checkpointing": "selective", "checkpointed_layers": 2},
    },
    "whole-parts": {**PARTS, "plan": {"micro_batch_tokens": 64}},
    "sharded-parts": {**PARTS, "plan": {"shard": True, "micro_batch_tokens": 64}},
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
    deep = make_checkpoint(tmp_path_factory.mktemp("deep") / "llama", "llama", num_hidden_layers=5)
    runs = {**RUNS, **{name: {**run, "base": str(deep)} for name, run in DEEP.items()}}
    process = launch(2, str(tiny_llama), str(together), json.dumps(runs))
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


@pytest.mark.parametrize(
    ("name", "whole"), [("sharded", "whole"), ("sharded-parts", "whole-parts")]
)
def test_a_sharded_base_trains_as_a_whole_one(
    alone_and_together: Any, name: str, whole: str
) -> None:
    """To the bit, in half the memory; afterwards every rank has all of it again."""
    _, together = alone_and_together
    for rank in (0, 1):
        found, expected = read(together, name, rank), read(together, whole, rank)
        assert "base sharded over 2 ranks" in found["plan"]
        assert "sharded" not in expected["plan"]
        for what in ("losses", "eval", "tokens"):
            assert found[what] == expected[what]
        for key, value in expected["weights"].items():
            assert torch.equal(found["weights"][key], value), key
        # Of five layers one rank holds three.
        share = (3 - rank) / 5
        assert found["held"] == pytest.approx(share * expected["held"], rel=1e-3)
        assert found["whole"] == expected["held"]
        loads_shards = "shard" in DEEP[name]
        assert found["loaded"] == pytest.approx(
            (share if loads_shards else 1) * expected["held"], rel=1e-3
        )


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


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(ranks, "_UNTIL_SAID", 0.05)
    first, second = (ranks.Node((4, 5), position, None) for position in (0, 1))
    with first.naming_missing("Reading it"):
        time.sleep(0.3)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("Reading it takes every rank of this machine. Rank 4 waits")
    assert "have not come to it: 5." in said
    caplog.clear()
    monkeypatch.setattr(ranks._Group, "calls", Counter())
    with second.naming_missing("Reading it"):
        time.sleep(0.3)
    assert not caplog.records


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
