"""Trainings that are killed, signalled and started twice, in real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl

from qlora_kit.errors import TrainingError
from qlora_kit.training.output_lock import _HOLDER_NAME, LOCK_NAME, hold_folder

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
    for one in [*found["killed"], found["twice"]]:
        went_on = one["again"]["did"]
        assert went_on == "was over" or went_on["weights"] == weights, one
    for one in [*found["signalled"], *found["signalled_again"]]:
        first, went_on = one["first"]["did"], one["again"]["did"]
        assert first["was_interrupted"], one
        assert 2 <= first["steps"] < 8, one
        assert went_on["weights"] == weights, one
        assert went_on["run"] == first["run"], one
    second = found["twice"]["second"]
    assert second["error"] == "TrainingError"
    assert "is in use: process" in second["said"]
    assert "checkpoint-2" in found["twice"]["checkpoints"]


def test_killed_and_signalled_trainings_go_on_and_a_second_one_is_refused(tiny_llama, tmp_path):
    found = _attack(tiny_llama, tmp_path, kills=0, signals=1)
    assert [one["signal"] for one in found["signalled"]] == ["SIGTERM"]
    _check(found)


@pytest.mark.slow
def test_many_kills_and_signals_go_on_to_the_same_weights(tiny_llama, tmp_path):
    found = _attack(tiny_llama, tmp_path, kills=30, signals=12)
    _check(found)
    cut = [one for one in found["killed"] if one["again"]["did"] != "was over"]
    assert sum(bool(one["checkpoints"]) for one in cut) >= 10
    assert {one["signal"] for one in found["signalled"]} == {
        "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_asks_for_the_end_and_a_second_one_insists(name, caplog):
    from qlora_kit.training.interrupts import InterruptCallback

    number, control = getattr(signal, name), TrainerControl()
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as nohup has it")
    before = signal.getsignal(number)
    interrupts = InterruptCallback()
    with interrupts.listening(), interrupts.training():
        signal.raise_signal(number)
        assert interrupts.was_requested
        interrupts.on_step_end(None, None, control)
        assert control.should_save
        assert control.should_training_stop
        with interrupts.holding():
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before
    assert "finishing this step and saving a checkpoint" in caplog.text
    assert "what is being saved or updated is finished first" in caplog.text


def test_a_folder_is_held_once_in_a_process_and_left_as_it_was(tmp_path):
    folder = tmp_path / "a" / "out"
    with hold_folder(folder, "one"):
        assert json.loads((folder / _HOLDER_NAME).read_text())["run"] == "one"
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
        assert json.loads((tmp_path / _HOLDER_NAME).read_text())["run"] == "one"
