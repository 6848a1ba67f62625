"""No field of SFTConfig is passed over in silence."""

import dataclasses
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from trl import SFTConfig

from qlora_kit import train_sft
from qlora_kit.engines.checkpointing import SPELLINGS
from qlora_kit.errors import ConfigError, MissingDependencyError
from qlora_kit.training import check_training, field_effects
from qlora_kit.training.field_effects import (
    ALWAYS,
    NOWHERE,
    ONLY_TRL,
    WHEN,
    Situation,
    find_idle_fields,
)
from qlora_kit.training.validation import REFUSED

ROWS = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(4)]
ADAM_ONLY = ("adam_beta1", "adam_beta2", "adam_epsilon")


def _args(**changes):
    made = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    return SimpleNamespace(**{**made, "report_to": [], "optim": "adamw_torch", **changes})


def test_every_field_of_the_installed_version_is_known_once():
    fields = {SPELLINGS.get(field.name, field.name) for field in dataclasses.fields(SFTConfig)}
    known = Counter([*ALWAYS, *ONLY_TRL, *NOWHERE, *WHEN, *REFUSED])
    assert fields - set(known) == set(), "decide what these do, and add them to field_effects.py"
    assert set(known) - fields == set()
    assert [name for name, count in known.items() if count > 1] == []


def test_what_needs_an_occasion_is_named_where_there_is_none():
    asked = dict.fromkeys((*WHEN, *NOWHERE, *ONLY_TRL), "asked")
    nothing = _args(
        max_steps=5, optim="sgd", optim_args="x=1", lr_scheduler_type="constant",
        logging_strategy="epoch", save_strategy="no",
    )  # fmt: skip
    assert set(find_idle_fields(asked, Situation(nothing, has_fast_step=True))) == set(asked)
    everything = _args(
        max_steps=-1, optim="galore_adamw", eval_strategy="steps", report_to=["trackio"], fsdp="x",
        push_to_hub=True, use_liger_kernel=True, dataloader_num_workers=2,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    found = find_idle_fields(
        asked, Situation(everything, False, True, True, True, True, True, world=2)
    )
    # transformers would have to know GaLore's optimizer to read anything with it.
    assert set(found) - set(ADAM_ONLY) == {*NOWHERE, "prediction_loss_only"}
    assert set(find_idle_fields(dict.fromkeys(ADAM_ONLY, 0.5), Situation(_args()))) == set()


def test_defaults_and_what_the_native_step_does_anyway_are_no_news():
    fast = Situation(_args(max_steps=5), has_fast_step=True)
    asked = {"run_name": None, "eval_delay": 0, "dataloader_prefetch_factor": None,
             "gradient_checkpointing_kwargs": {"use_reentrant": False}}  # fmt: skip
    assert find_idle_fields(asked, fast) == {}
    assert find_idle_fields({"dataloader_pin_memory": False}, fast) != {}


def test_a_field_of_a_newer_version_is_handed_on_and_said(monkeypatch):
    monkeypatch.setattr(field_effects, "ALWAYS", tuple(name for name in ALWAYS if name != "seed"))
    assert "newer" in find_idle_fields({"seed": 1, "max_seq_length": 9}, Situation(_args()))["seed"]


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"optim_args": "momentum=0.9"}, ConfigError, "'adamw_8bit' reads no 'momentum'"),
        ({"optim_args": "a=b", "optim": "sgd"}, ConfigError, "'sgd' reads no 'a'"),
        ({"optim_args": "=", "optim": "sgd"}, ConfigError, "must be names and values"),
        ({"optim_args": "momentum=x", "optim": "sgd"}, ConfigError, "does not go with"),
        ({"report_to": "wandbb"}, ConfigError, "Did you mean 'wandb'"),
        ({"report_to": ["none", "nope"]}, ConfigError, "there is no tracker 'nope'"),
        ({"report_to": "neptune"}, MissingDependencyError, "neptune is not installed here"),
        ({"enable_jit_checkpoint": True}, ConfigError, "SIGTERM saves a checkpoint"),
    ],
)
def test_what_nothing_would_read_is_refused_before_a_model_is_loaded(
    settings, kind, said, tmp_path
):
    with pytest.raises(kind) as caught:
        check_training(output_dir=tmp_path, **settings)
    assert said in str(caught.value)
    assert caught.value.parameter in settings


def test_options_that_an_optimizer_reads_are_taken(tmp_path):
    check_training(output_dir=tmp_path, optim="sgd", optim_args="momentum=0.9, nesterov=true")
    # At its own default too, where it makes no difference.
    check_training(output_dir=tmp_path, optim="rmsprop", optim_args="momentum=0.0,centered=false")


def test_a_run_says_once_what_it_has_no_use_for(adapted, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        train_sft(
            adapted, ROWS, output_dir=tmp_path, max_steps=1, num_train_epochs=2, disable_tqdm=True,
            plan={"compile": False}, gradient_checkpointing_kwargs={"use_reentrant": True},
            run_name="mine", optim="adafactor", adam_beta1=0.5,
        )  # fmt: skip
    (said,) = [one for one in caplog.messages if one.startswith("Without effect in this run")]
    assert "num_train_epochs (max_steps counts instead)" in said
    assert "gradient_checkpointing_kwargs (the native step" in said
    assert "run_name (it is a tracker's" in said
    assert "adam_beta1 (the optimizer that runs does not read it)" in said
    assert "max_steps (" not in said
