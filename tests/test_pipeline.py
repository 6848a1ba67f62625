"""The whole way as one value: checked first, then run."""

import json

import pytest

import qlora_kit
from qlora_kit import Pipeline, check_pipeline, run_pipeline
from qlora_kit.errors import (
    ConfigError,
    DataError,
    DestinationExistsError,
    UnknownOptionError,
)

QUICK = {"max_steps": 2, "disable_tqdm": True, "plan": False}


@pytest.fixture
def make(tiny_llama, alpaca_rows, tmp_path):
    def make(**fields):
        training = {**QUICK, "output_dir": tmp_path / "run", **fields.pop("training", {})}
        start = {"model": tiny_llama, "data": alpaca_rows, "training": training}
        loading = {"dtype": "float32", "max_seq_length": 64, **fields.pop("loading", {})}
        return Pipeline(**{**start, "loading": loading, **fields})

    return make


def test_a_pipeline_trains_evaluates_and_exports(make, alpaca_rows, tmp_path):
    seen = []
    result = run_pipeline(
        make(
            eval_data=alpaca_rows[:3],
            adapter={"r": 4, "lora_alpha": 8},
            formatting={"template": "alpaca", "response_only": True},
            exports=["lora"],
        ),
        on_trained=seen.append,
    )
    assert seen == [result.training]
    assert result.training.steps == 2
    assert len(result.training.eval_losses) > 0
    assert result.model.adapter.r == 4
    assert result.model.record.formatter.response_only
    assert result.exports["lora"].path == tmp_path / "run" / "lora"
    assert result.exports.failures == {}


def test_it_is_what_the_stages_do_one_by_one(make, tiny_llama, alpaca_rows, tmp_path):
    got = run_pipeline(make()).training
    model = qlora_kit.load_quantized(tiny_llama, dtype="float32", max_seq_length=64)
    model = qlora_kit.attach_lora(model)
    expected = qlora_kit.train_sft(model, alpaca_rows, output_dir=tmp_path / "other", **QUICK)
    assert got.losses == expected.losses


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"loading": {"load_in_4bits": True}}, UnknownOptionError, "'load_in_4bit'"),
        ({"loading": {"max_seq_length": 0}}, ConfigError, "at least 1 token"),
        ({"adapter": {"rank": 8}}, UnknownOptionError, "no argument 'rank'"),
        ({"adapter": {"r": 0}}, ConfigError, "LoRA rank"),
        ({"formatting": {"templat": "chat"}}, UnknownOptionError, "'template'"),
        ({"formatting": {"template": "alpca"}}, ConfigError, "'alpaca'"),
        ({"data": [{"question": "a"}]}, DataError, "columns="),
        ({"eval_data": [{"instruction": "a", "output": ""}]}, DataError, "is empty"),
        ({"training": {"learning_rat": 1}}, UnknownOptionError, "'learning_rate'"),
        ({"training": {"formatter": None}}, ConfigError, "place of its own"),
        ({"exports": ["loar"]}, ConfigError, "'lora'"),
        ({"exports": {"merged_16bit": {"dtyp": "x"}}}, UnknownOptionError, "'dtype'"),
    ],
)
def test_what_can_be_wrong_is_said_before_a_model_is_looked_for(make, fields, error, said):
    with pytest.raises(error, match=said):
        check_pipeline(make(model="/there/is/none", **fields))


def test_an_occupied_destination_is_refused_before_training(make, tmp_path):
    (tmp_path / "run" / "lora").mkdir(parents=True)
    (tmp_path / "run" / "lora" / "old").touch()
    with pytest.raises(DestinationExistsError):
        check_pipeline(make(exports=["lora"]))
    # What no export put there is not replaced either.
    with pytest.raises(DestinationExistsError, match="what no export put there: old"):
        check_pipeline(make(exports=["lora"], overwrite=True))
    (tmp_path / "run" / "lora" / "old").unlink()
    check_pipeline(make(exports=["lora"], overwrite=True))


def test_a_saved_adapter_trains_on_and_refuses_to_be_another(make, tmp_path):
    result = run_pipeline(make(adapter={"r": 4}, exports="lora"))
    saved = result.exports["lora"].path
    again = run_pipeline(make(model=saved, training={"output_dir": tmp_path / "again"}))
    assert again.model.adapter.r == 4
    with pytest.raises(ConfigError, match=r"trains on as it is: r=8 .* has 4"):
        run_pipeline(make(model=saved, adapter={"r": 8}))


def test_token_ids_take_no_formatting(make):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 4
    with pytest.raises(ConfigError, match="Leave out system, eos_token"):
        check_pipeline(make(data=rows, formatting={"system": "x", "eos_token": "y"}))


def test_rows_are_read_once(make, alpaca_rows, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(alpaca_rows), encoding="utf-8")
    checked = check_pipeline(make(data=path))
    path.unlink()
    assert run_pipeline(checked).training.steps == 2
