"""Trackers that transformers knows: each without an account and without a network."""

import json
import re
import sqlite3

import pytest

from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft


def _read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "board"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def _read_wandb(folder):
    import wandb

    # The process' end does it, too.
    wandb.finish()
    # Its own format; the values of each step stand in it as text, twice.
    (log,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found = re.findall(rb"train/loss[^\d]{1,4}(\d+\.\d{3,})", log.read_bytes())
    return dict(enumerate(map(float, dict.fromkeys(found)), 1))


def _read_mlflow(folder):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs(["0"])
    return {one.step: one.value for one in client.get_metric_history(run.info.run_id, "loss")}


def _read_trackio(folder):
    (database,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics").fetchall()
    logged = [json.loads(metrics) for _, metrics in rows]
    return {one["train/global_step"]: one["train/loss"] for one in logged if "train/loss" in one}


TRACKERS = {
    "tensorboard": _read_tensorboard,
    "wandb": _read_wandb,
    "mlflow": _read_mlflow,
    "trackio": _read_trackio,
}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_is_reported_without_an_account(name, tiny_llama, alpaca_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # Only now: trackio reads its folder while it is imported.
    pytest.importorskip(name, reason=f"{name} is not installed (the extra trackers)")
    model = attach_lora(load_quantized(tiny_llama, 64, "float32"), r=4)
    formatter = AlpacaFormatter(model.tokenizer)
    result = train_sft(
        model, formatter.load(alpaca_rows), max_steps=2, output_dir=tmp_path / "run", plan=False,
        save_strategy="no", disable_tqdm=True, report_to=[name], run_name="first", project="otters",
    )  # fmt: skip
    logged = TRACKERS[name](tmp_path)
    assert logged == pytest.approx(dict(enumerate(result.losses, 1)), rel=1e-3)
