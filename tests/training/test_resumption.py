"""Whose run is continued, from which checkpoint, and what is said of the others."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from qlora_kit import attach_lora, load_quantized, train_sft
from qlora_kit.errors import ConfigError
from qlora_kit.training.checkpoint import Checkpoint
from qlora_kit.training.resumption import find_checkpoints

FAST = {
    "max_steps": 4, "learning_rate": 2e-2, "warmup_steps": 1, "disable_tqdm": True,
    "save_strategy": "steps", "save_steps": 2, "plan": {"compile": False},
}  # fmt: skip


@pytest.fixture
def model(tiny_llama):
    return attach_lora(load_quantized(tiny_llama, 64, "float32", False, engine="native"), r=4)


@pytest.fixture
def train(tiny_llama, alpaca_rows):
    def train(folder, rows=alpaca_rows, **settings):
        base = load_quantized(tiny_llama, 64, "float32", False, engine="native")
        adapted = attach_lora(base, r=4)
        return train_sft(adapted, rows, output_dir=folder, **{**FAST, **settings})

    return train


@pytest.fixture(scope="module")
def saved(tiny_llama, alpaca_rows, tmp_path_factory):
    """A run with two whole checkpoints, and its losses."""
    folder = tmp_path_factory.mktemp("saved")
    base = load_quantized(tiny_llama, 64, "float32", False, engine="native")
    result = train_sft(attach_lora(base, r=4), alpaca_rows, output_dir=folder, **FAST)
    return folder, result


@pytest.fixture
def copied(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copied")
    return folder, saved[1]


def _rates(result):
    return {entry["step"]: entry["learning_rate"] for entry in result.log_history
            if "learning_rate" in entry}  # fmt: skip


def test_a_checkpoint_says_whose_it_is_and_hashes_its_files(saved):
    folder, result = saved
    manifest = json.loads((folder / "checkpoint-2" / "qlora_kit_manifest.json").read_text())
    assert manifest["run"]["id"] == result.run_id
    identity = manifest["run"]["identity"]
    assert identity["data"]
    assert identity["base"]
    assert identity["arguments"]["learning_rate"] == 2e-2
    names = {file["name"] for file in manifest["files"]}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
            "trainer_state.json"} <= names  # fmt: skip
    assert json.loads(result.manifest_path.read_text())["run"]["id"] == result.run_id


def test_a_run_that_goes_on_keeps_its_id_and_says_from_where(copied, train, caplog):
    folder, whole = copied
    shutil.rmtree(folder / "checkpoint-4")
    with caplog.at_level(logging.INFO):
        rest = train(folder, resume_from_checkpoint=True)
    assert rest.run_id == whole.run_id
    assert rest.losses == whole.losses[2:]
    assert f"goes on from {folder / 'checkpoint-2'}, at step 2" in caplog.text
    resumed = json.loads(rest.manifest_path.read_text())["run"]["resumed_from"]
    assert resumed == {"path": str(folder / "checkpoint-2"), "step": 2, "run": whole.run_id}


def test_another_runs_checkpoint_is_refused_with_the_way_to_insist(
    copied, train, alpaca_rows, caplog
):
    folder, whole = copied
    other = {"rows": alpaca_rows[:6], "seed": 1, "learning_rate": 1e-5, "max_steps": 6}
    with pytest.raises(ConfigError) as caught:
        train(folder, resume_from_checkpoint=True, **other)
    for part in (
        f"another run's ({whole.run_id}, step 4)", "other rows", "learning_rate 0.02 -> 1e-05",
        "seed 3407 -> 1", "resume_with_changes=True",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="other rows"):
        train(folder, resume_from_checkpoint=folder / "checkpoint-2", **other)
    # A new run in the same folder keeps apart what lies there.
    started = train(folder, resume_from_checkpoint="auto", **{**other, "save_strategy": "no"})
    assert started.steps == len(started.losses) == 6
    assert "passed over, being another run's" in caplog.text
    assert f"held the checkpoints of another run, {whole.run_id}" in caplog.text
    insisted = train(folder, resume_from_checkpoint=True, resume_with_changes=True, **other)
    assert insisted.steps == 6
    assert insisted.run_id != whole.run_id
    # Applied, and not only written down: one warm-up step, then linear to 0 at the sixth.
    assert _rates(insisted)[5] == pytest.approx(1e-5 * 2 / 5)
    manifest = json.loads(insisted.manifest_path.read_text())
    assert manifest["arguments"]["learning_rate"] == 1e-5
    assert "learning_rate 0.02 -> 1e-05" in manifest["run"]["changes"]


def test_more_steps_follow_the_longer_schedule_at_once(copied, train):
    folder, _ = copied
    rest = train(folder, resume_from_checkpoint=True, max_steps=6)
    # The rate of the shorter schedule was 0 at its end.
    assert _rates(rest)[5] == pytest.approx(2e-2 * 2 / 5)


@pytest.mark.parametrize(
    "change", [{"optim": "sgd"}, {"lr_scheduler_type": "greedy", "eval_strategy": "steps"}]
)
def test_an_optimizer_that_cannot_take_over_is_refused(copied, train, alpaca_rows, change):
    if "eval_strategy" in change:
        change = {**change, "eval_dataset": alpaca_rows[:2]}
    with pytest.raises(ConfigError, match="cannot be taken over"):
        train(copied[0], resume_from_checkpoint=True, resume_with_changes=True, max_steps=6,
              **change)  # fmt: skip


def test_without_optimizer_state_the_rate_goes_on_and_it_is_said(train, tmp_path, caplog):
    whole = train(tmp_path, save_only_model=True)
    shutil.rmtree(tmp_path / "checkpoint-4")
    rest = train(tmp_path, save_only_model=True, resume_from_checkpoint=True)
    assert "holds no optimizer state" in caplog.text
    assert {step: rate for step, rate in _rates(whole).items() if step > 2} == {
        step: rate for step, rate in _rates(rest).items() if step > 2
    }


def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(train, tmp_path):
    first = train(tmp_path, resume_from_checkpoint="auto", max_steps=2)
    assert first.steps == len(first.losses) == 2
    rest = train(tmp_path, resume_from_checkpoint="auto")
    assert (rest.steps, len(rest.losses), rest.run_id) == (4, 2, first.run_id)


def test_a_new_run_keeps_an_earlier_ones_checkpoints_apart(copied, train, caplog):
    """Neither writes over the other, and each goes on from its own."""
    folder, first = copied
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-4").iterdir()}
    # Killed while it was written: nobody's.
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "optimizer.pt").write_text("half")
    second = train(folder, seed=1, max_steps=2)
    assert [Checkpoint(path).run_id for path in folder.glob("checkpoint-2")] == [second.run_id]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    apart = folder / f"earlier-{first.run_id}"
    assert f"They are in {apart} now." in caplog.text
    assert {path.name: path.read_bytes() for path in (apart / "checkpoint-4").iterdir()} == before
    assert json.loads((apart / "qlora_kit_manifest.json").read_text())["run"]["id"] == first.run_id
    assert (apart / "report.html").is_file()
    rest = train(folder, resume_from_checkpoint="auto", max_steps=6)
    assert (rest.run_id, len(rest.losses)) == (first.run_id, 2)
    assert (folder / f"earlier-{second.run_id}" / "checkpoint-2").is_dir()
    # The same once more, anew: its steps are others' too.
    caplog.clear()
    again = train(folder, max_steps=6)
    assert again.run_id != first.run_id
    assert "'auto' goes on where it ended" in caplog.text
    assert (folder / f"earlier-{first.run_id}" / "checkpoint-6").is_dir()


def test_insisting_goes_on_from_where_the_checkpoint_was_moved_to(copied, train):
    folder, first = copied
    insisted = train(folder, resume_from_checkpoint=folder / "checkpoint-2", seed=1,
                     resume_with_changes=True)  # fmt: skip
    moved = folder / f"earlier-{first.run_id}" / "checkpoint-2"
    resumed = json.loads(insisted.manifest_path.read_text())["run"]["resumed_from"]
    assert (Path(resumed["path"]), len(insisted.losses)) == (moved, 2)
    assert Checkpoint(folder / "checkpoint-4").run_id == insisted.run_id


def test_insisting_needs_something_to_insist_on(train, tmp_path):
    with pytest.raises(ConfigError, match="give resume_from_checkpoint"):
        train(tmp_path, resume_with_changes=True)
    with pytest.raises(ConfigError, match="True or False, got 1"):
        train(tmp_path, resume_with_changes=1, resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_whose_it_is_must_be_named(copied, train, caplog):
    folder, whole = copied
    for path in folder.glob("checkpoint-*/qlora_kit_manifest.json"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"does not say whose run .*checkpoint-4'"):
        train(folder, resume_from_checkpoint=True, max_steps=6)
    rest = train(folder, resume_from_checkpoint=folder / "checkpoint-2")
    assert rest.losses == whole.losses[2:]
    assert "does not say whose run it is of" in caplog.text
    [apart] = folder.glob("*unknown/checkpoint-2")
    (apart / "optimizer.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ConfigError, match=r"optimizer\.pt is damaged"):
        train(folder, resume_from_checkpoint=apart)


def test_a_limit_deletes_no_other_runs_checkpoints(copied, train):
    folder, _ = copied
    train(folder, seed=1, max_steps=9, save_steps=3, save_total_limit=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-6", "checkpoint-9",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.glob("*/checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4",
    ]  # fmt: skip


# -- damage ----------------------------------------------------------------------------------


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(bytes(content))


DAMAGED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
           "trainer_state.json", "adapter_config.json", "qlora_kit_manifest.json")  # fmt: skip
WAYS = {
    "gone": Path.unlink, "empty": lambda path: path.write_bytes(b""), "cut": _cut, "flipped": _flip,
}  # fmt: skip
DAMAGES = [(name, way) for name in DAMAGED for way in WAYS]


@pytest.mark.parametrize(("name", "way"), DAMAGES)
def test_every_damage_of_the_last_checkpoint_is_seen(copied, model, name, way):
    folder, _ = copied
    WAYS[way](folder / "checkpoint-4" / name)
    damaged = Checkpoint(folder / "checkpoint-4")
    found = find_checkpoints(True, folder, model)
    if damaged.damage is None:
        # Then it is no longer known whose it is, or the manifest says other things of it.
        assert name == "qlora_kit_manifest.json"
        assert not damaged.is_proven or way == "flipped"
    else:
        assert [one.path.name for one in found] == ["checkpoint-2"]
    assert found[-1].damage is None


def _check_fallback(copied, train, caplog, name, way):
    folder, whole = copied
    WAYS[way](folder / "checkpoint-4" / name)
    rest = train(folder, resume_from_checkpoint=True, max_steps=4)
    assert rest.losses == whole.losses[2:]
    assert rest.run_id == whole.run_id
    assert f"{folder / 'checkpoint-4'} is passed over" in caplog.text


@pytest.mark.parametrize(("name", "way"), [DAMAGES[2], DAMAGES[4], DAMAGES[-4]])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(copied, train, caplog, name, way):
    _check_fallback(copied, train, caplog, name, way)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), DAMAGES[:-1])
def test_every_damage_falls_back_to_the_same_result(copied, train, caplog, name, way):
    _check_fallback(copied, train, caplog, name, way)


def test_where_nothing_is_whole_the_damage_is_named(copied, train):
    folder, _ = copied
    for number in (2, 4):
        _flip(folder / f"checkpoint-{number}" / "optimizer.pt")
    with pytest.raises(ConfigError, match=r"no whole checkpoint.*checkpoint-4.*optimizer\.pt"):
        train(folder, resume_from_checkpoint=True)
