"""Trainings that are killed, signalled and started twice, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.errors import TrainingError
from qlora_kit.training.output_lock import LOCK_NAME, hold_folder

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def _attack(base, folder, kills, signals):
    done = subprocess.run(
        [sys.executable, str(HELPERS / "training_attacks.py"), str(base), str(folder),
         str(kills), str(signals)],
        capture_output=True, text=True, timeout=3000, check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check(found):
    weights = found["reference"]["did"]["weights"]
    for one in found["killed"]:
        went_on = one["again"]["did"]
        assert went_on == "was over" or went_on["weights"] == weights, one
    for one in [*found["signalled"], *found["signalled_again"]]:
        first = one["first"]["did"]
        assert first["was_interrupted"], one
        assert 2 <= first["steps"] < 8, one
        if one["again"] is None:
            continue
        went_on = one["again"]["did"]
        assert went_on["weights"] == weights, one
        assert went_on["run"] == first["run"], one


@pytest.fixture(scope="module")
def found(tiny_llama, tmp_path_factory):
    return _attack(tiny_llama, tmp_path_factory.mktemp("attacks"), kills=1, signals=1)


def test_killed_and_signalled_trainings_go_on_to_the_same_weights(found):
    assert {one["signal"] for one in found["signalled"]} == {
        "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1",
    }  # fmt: skip
    _check(found)


def test_a_second_training_in_the_folder_is_refused_while_the_first_lives(found):
    second = found["twice"]["second"]
    assert second["error"] == "TrainingError"
    assert "is in use: process" in second["said"]
    assert found["twice"]["after_the_first_was_killed"]["did"]["steps"] == 8


@pytest.mark.slow
def test_many_kills_and_signals_go_on_to_the_same_weights(tiny_llama, tmp_path):
    found = _attack(tiny_llama, tmp_path, kills=30, signals=12)
    _check(found)
    cut = [one for one in found["killed"] if one["again"]["did"] != "was over"]
    assert len(cut) >= 10


def test_a_folder_is_held_once_in_a_process_and_left_as_it_was(tmp_path):
    folder = tmp_path / "a" / "out"
    with hold_folder(folder, "one"):
        assert json.loads((folder / LOCK_NAME).read_text())["run"] == "one"
        with (
            pytest.raises(TrainingError, match="another thread of this process"),
            hold_folder(tmp_path / "a" / ".." / "a" / "out", "two"),
        ):
            pass
        with hold_folder(tmp_path / "other", "three"):
            pass
    assert not folder.exists()
    folder.mkdir(parents=True)
    with hold_folder(folder, "four"):
        pass
    assert list(folder.iterdir()) == []


def test_a_lock_that_a_killed_process_left_is_taken(tmp_path):
    (tmp_path / LOCK_NAME).write_text('{"process": 1, "host": "x", "run": "y", "since": "z"}')
    with hold_folder(tmp_path, "one"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["run"] == "one"
