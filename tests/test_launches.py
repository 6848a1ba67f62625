"""What several processes of one launch want is made once, and what one of them asks alone, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit import launches
from qlora_kit.file_locks import holding_lock, is_locked

ASK = """
import sys, time
from pathlib import Path
from qlora_kit.launches import once_a_machine

def make():
    with open(sys.argv[1], "a") as file:
        file.write("made\\n")
    time.sleep(0.5)
    return "the answer"

print(once_a_machine("a thing", Path(sys.argv[1]).name, make))
"""


def test_the_first_to_come_makes_it(tmp_path: Path) -> None:
    made = tmp_path / "made"
    over = tmp_path / "cache" / "launches" / f"{os.getpid()}-1.00"
    over.mkdir(parents=True)
    environment = {**os.environ, "QLORA_KIT_CACHE": str(tmp_path / "cache"), "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, str(made)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == ["the answer"] * 3
    assert made.read_text().count("made") == 1
    # Of launches that are over nothing is left.
    assert not over.exists()
    assert len(list(over.parent.iterdir())) == 1


def test_whoever_is_alone_makes_it_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    answers = iter(("first", "second"))
    assert [launches.once_a_machine("it", 1, lambda: next(answers)) for _ in range(2)] == [
        "first", "second",
    ]  # fmt: skip


def test_a_lock_ends_with_its_work_and_where_there_is_none(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "it.lock"
    with holding_lock(lock, "work"):
        assert is_locked(lock)
    assert not lock.exists()
    # Nowhere to keep one: the work is done all the same.
    (tmp_path / "file").write_text("")
    with holding_lock(tmp_path / "file" / "it.lock", "work"):
        pass
