"""What cannot train is refused before data is encoded; what rows do not use is said."""

import logging

import pytest

from qlora_kit import AlpacaFormatter, train_sft
from qlora_kit.errors import ConfigError, DataError, UnknownOptionError

ROWS = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(4)]


def _stopping():
    from transformers import EarlyStoppingCallback

    return EarlyStoppingCallback


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval_on_start": True}, "eval_on_start=True needs rows to evaluate on"),
        ({"load_best_model_at_end": True}, "needs rows to evaluate on"),
        ({"callbacks": [_stopping()]}, "EarlyStoppingCallback needs rows to evaluate on"),
        (
            {"callbacks": [_stopping()], "eval_dataset": "none"},
            "metric_for_best_model='eval_loss'",
        ),
        (
            {"eval_dataset": {"a": "none"}, "load_best_model_at_end": True},
            "give metric_for_best_model='eval_a_loss'",
        ),
    ],
)
def test_evaluations_that_will_not_happen_are_refused_before_data_is_read(
    settings, said, adapted, tmp_path
):
    with pytest.raises(ConfigError) as caught:
        train_sft(adapted, "no such rows", output_dir=tmp_path, **settings)
    assert said in str(caught.value)


def test_activations_are_not_offloaded_from_a_cpu_to_a_cpu(adapted, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="activation_offloading=True moves"):
        train_sft(adapted, "none", output_dir=tmp_path, activation_offloading=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("group_by_length", "packing=True"),
        ("args", "as keywords"),
        ("data_collator", "formatter=..."),
        ("tokenizer", "model.tokenizer"),
    ],
)
def test_arguments_of_other_trainers_get_an_answer(name, said, adapted, tmp_path):
    with pytest.raises(UnknownOptionError) as caught:
        train_sft(adapted, ROWS, output_dir=tmp_path, **{name: None})
    assert said in str(caught.value)


@pytest.mark.parametrize("columns", [5, "x", ["a"], {"instruction": 5}])
def test_columns_of_another_kind_are_refused(adapted, tmp_path, columns):
    with pytest.raises(ConfigError, match="columns must be a mapping of roles"):
        train_sft(adapted, [{"q": "a"}], output_dir=tmp_path, columns=columns)


def test_a_dictionary_of_held_out_rows_has_losses(make_adapted, tmp_path):
    result = train_sft(
        make_adapted(),
        ROWS,
        eval_dataset={"a": ROWS[:2], "b": ROWS[2:]},
        output_dir=tmp_path,
        max_steps=2,
        eval_steps=1,
        save_strategy="no",
    )
    assert [step for step, _ in result.eval_losses] == [1, 1, 2, 2]
    assert all(loss > 0 for _, loss in result.eval_losses)


def test_columns_are_named_where_there_is_no_formatter(make_adapted, tmp_path, caplog):
    rows = [{"q": row["instruction"], "a": row["output"], "id": "x"} for row in ROWS]
    model, options = make_adapted(), {"output_dir": tmp_path, "max_steps": 1, "save_strategy": "no"}
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        train_sft(model, rows, columns={"instruction": "q", "output": "a"}, **options)
    assert "Not used of a list of 4: the column 'id' (4, such as 'x')." in caplog.text
    caplog.clear()
    formatter = AlpacaFormatter(model.tokenizer, columns={"instruction": "q", "output": "a"})
    loaded = formatter.load(rows)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        result = train_sft(model, loaded, **options)
    assert "the column 'id' (4, such as 'x')" in caplog.text
    assert "the column 'id'" in result.manifest_path.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="columns was given beside a formatter"):
        train_sft(model, loaded, columns={"instruction": "q"}, **options)


def test_a_streaming_dataset_is_told_what_to_do(adapted, tmp_path):
    from datasets import Dataset

    with pytest.raises(DataError, match=r"list\(dataset\.take"):
        train_sft(adapted, Dataset.from_list(ROWS).to_iterable_dataset(), output_dir=tmp_path)


@pytest.mark.parametrize("what", ["eos", "pad"])
def test_a_token_without_an_embedding_is_refused_before_training(what, make_adapted, tmp_path):
    model = make_adapted()
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    size = model.model.get_input_embeddings().num_embeddings
    new = model.tokenizer.convert_tokens_to_ids("<new>")
    if new < size:
        model.tokenizer.add_tokens([f"<{n}>" for n in range(size - new + 1)])
        name = model.tokenizer.convert_ids_to_tokens(len(model.tokenizer) - 1)
    else:
        name = "<new>"
    options = {"output_dir": tmp_path, "max_steps": 1, "save_strategy": "no"}
    formatter = None
    if what == "eos":
        formatter = AlpacaFormatter(model.tokenizer, eos_token=name)
    else:
        model.tokenizer.pad_token = name
    with pytest.raises(ConfigError, match=rf"'{name}'.* embeddings for {size} tokens only"):
        train_sft(model, ROWS, formatter=formatter, **options)
