"""Activation checkpointing under both of its names, asked for, measured and undone."""

import warnings

import pytest

from qlora_kit import AlpacaFormatter, train_sft
from qlora_kit.engines.checkpointing import is_checkpointing
from qlora_kit.errors import ConfigError, TrainingError

NAMES = ("gradient_checkpointing", "activation_checkpointing")


def _train(model, rows, folder, **settings):
    formatter = AlpacaFormatter(model.tokenizer)
    return train_sft(
        model, formatter.load(rows), output_dir=folder, max_steps=1, save_strategy="no",
        per_device_train_batch_size=4, gradient_accumulation_steps=1, disable_tqdm=True, **settings,
    )  # fmt: skip


@pytest.fixture
def rows(alpaca_rows):
    return alpaca_rows[:4]


@pytest.mark.parametrize("name", NAMES)
def test_both_names_recompute_layers_and_leave_the_model_as_found(
    name, make_adapted, rows, tmp_path
):
    runs = {}
    for value in (False, True):
        model = make_adapted()
        layer, calls = model.model.get_base_model().model.layers[0].self_attn, []
        handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message=".*checkpointing.*", category=FutureWarning, module="qlora_kit"
            )
            result = _train(model, rows, tmp_path / str(value), plan=False, **{name: value})
        handle.remove()
        assert not is_checkpointing(model.model)
        runs[value] = (len(calls), result.losses)
    assert runs[True][0] == 2 * runs[False][0] > 0
    assert runs[True][1] == pytest.approx(runs[False][1], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_both_names_decide_for_the_fast_step(name, make_adapted, rows, tmp_path):
    model = make_adapted()
    assert "checkpointing full" in _train(model, rows, tmp_path / "a", **{name: True}).plan
    assert "checkpointing none" in _train(model, rows, tmp_path / "b", **{name: False}).plan
    assert not is_checkpointing(model.model)


def test_the_names_may_not_contradict_each_other(make_adapted, rows, tmp_path):
    model = make_adapted()
    with pytest.raises(ConfigError, match="two names of one setting"):
        _train(model, rows, tmp_path, gradient_checkpointing=True, activation_checkpointing=False)
    with pytest.raises(ConfigError, match="activation_checkpointing must be True or False"):
        _train(model, rows, tmp_path, activation_checkpointing="yes")
    both = dict.fromkeys(NAMES, True)
    assert "checkpointing full" in _train(model, rows, tmp_path, **both).plan


def test_keywords_of_checkpointing_reach_it_under_both_names(make_adapted, rows, tmp_path):
    model = make_adapted()
    for name in NAMES:
        with pytest.raises(TrainingError, match="no_such_keyword"):
            _train(
                model, rows, tmp_path / name, plan=False,
                **{name: True, f"{name}_kwargs": {"no_such_keyword": 1}},
            )  # fmt: skip
