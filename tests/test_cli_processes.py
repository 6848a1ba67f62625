"""``train --nproc``: several processes, one result, one document, one exit status."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_kit.cli import main
from qlora_kit.cli.processes import drop_flag

SETTINGS = [
    "--plan", '{"compile": false}', "--max-seq-length", "64", "--dtype", "float32", "--no-4bit",
    "--r", "2",
]  # fmt: skip


def _start(model, rows, folder, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", "train", str(model), str(rows), "--nproc", "2",
         "--output", str(folder), *SETTINGS, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def rows(alpaca_rows, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(alpaca_rows))
    return path


def test_the_flag_is_not_passed_on():
    assert drop_flag(["train", "--nproc", "2", "m", "--nproc=3"], "--nproc") == ["train", "m"]


@pytest.mark.parametrize("asked", ["0", "two", "-1"])
def test_counts_that_are_none_are_refused(asked, tiny_llama, rows, capsys):
    assert main(["train", str(tiny_llama), str(rows), "--nproc", asked]) == 1
    assert "--nproc takes a number of processes, or auto" in capsys.readouterr().err


def test_more_processes_than_the_machine_can_run_are_refused(tiny_llama, rows, monkeypatch, capsys):
    import torch

    for cards, said in ((0, "this machine has cores"), (4, "there are cards here: 4")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        assert main(["train", str(tiny_llama), str(rows), "--nproc", "1000000"]) == 1
        assert said in capsys.readouterr().err


def test_a_launcher_has_counted_already(tiny_llama, rows, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(tiny_llama), str(rows), "--nproc", "2"]) == 1
    assert "Leave out --nproc" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_one_document(tiny_llama, rows, tmp_path):
    process = _start(
        tiny_llama,
        rows,
        tmp_path / "out",
        "--json",
        "--max-steps",
        "2",
        "--export",
        "lora,merged_16bit",
    )
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    report = json.loads(out)
    assert report["training"]["steps"] == 2
    assert [one["format"] for one in report["exports"]] == ["lora", "merged_16bit"]
    # Twice the rows of one process in each step.
    manifest = json.loads((tmp_path / "out" / "qlora_kit_manifest.json").read_text())
    assert manifest["run"]["identity"]["arguments"]["rows_per_step"] == 16


@pytest.mark.slow
def test_ctrl_c_reaches_each_process_once(tiny_llama, rows, tmp_path):
    process = _start(tiny_llama, rows, tmp_path / "out", "--save-steps", "1", "--max-steps", "5000")
    while not list(tmp_path.glob("out/checkpoint-*")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors[-3000:]
    for said in ("Training was interrupted", "Stopped, nothing was exported."):
        assert errors.count(said) == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_what_fails_ends_all_and_says_in_which_process(tiny_llama, rows, tmp_path):
    process = _start(tiny_llama, rows, tmp_path / "out", "--eos-token", "<absent>")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Process 0: ConfigError: The tokenizer has no end token" in errors, errors[-3000:]
    assert "Traceback" not in errors
