"""Settings of a run that cannot work, found without a model.

This module refuses; it chooses no defaults.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean
from qlora_kit.values import is_finite_number, is_whole_number

__all__ = [
    "REFUSED",
    "check_names",
    "check_output_folder",
    "check_values",
]

#: Fields that would make TRL format or tokenize again, and what to use instead.
REFUSED: Final[Mapping[str, str]] = {
    "completion_only_loss": "Use AlpacaFormatter(tokenizer, response_only=True).",
    "assistant_only_loss": "Use ChatFormatter(tokenizer), which trains on the assistant alone.",
    "eos_token": "Use AlpacaFormatter(tokenizer, eos_token=...).",
    "pad_token": "Set model.tokenizer.pad_token before formatting; padding never carries loss.",
    "chat_template_path": "Use ChatFormatter(tokenizer, chat_template=...).",
    "model_init_kwargs": "The model is already loaded; give these to load_quantized.",
    "dataset_kwargs": "The data is tokenized by the formatter; TRL prepares nothing.",
    "dataset_text_field": "Name columns in the formatter: AlpacaFormatter(tokenizer, columns=...).",
    "remove_unused_columns": "The data holds only the columns that training uses.",
    "eval_packing": "Evaluation rows are never packed.",
    "trust_remote_code": "Give it to load_quantized.",
    "do_train": "train_sft trains.",
}

_AT_LEAST_ONE: Final = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip


def check_names(fields: Mapping[str, Any]) -> None:
    """Refuse fields that do not exist, or that this library carries out in another way.

    Raises:
        UnknownOptionError: For names that are not ``SFTConfig`` fields, all of them at once.
        ConfigError: For fields that contradict how the data is prepared here.
    """
    from trl import SFTConfig

    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    known = {*defaults, "max_seq_length"}
    unknown = [name for name in fields if name not in known]
    if unknown:
        hints = "".join(
            f" {name!r}:{did_you_mean(name, known) or ' nothing near.'}" for name in unknown
        )
        raise UnknownOptionError(
            f"train_sft and SFTConfig have no {', '.join(map(repr, unknown))}.{hints}"
        )
    for name, advice in REFUSED.items():
        if name in fields and fields[name] not in (None, False, defaults.get(name)):
            raise ConfigError(f"{name}={fields[name]!r} has no effect here. {advice}")
    if fields.get("truncation_mode", "keep_start") != "keep_start":
        raise ConfigError(
            "truncation_mode='keep_end' would cut the instruction off. Use truncation='end', "
            "'drop' or 'error'."
        )


def check_values(fields: Mapping[str, Any], *, has_eval: bool) -> None:
    """Refuse values that the trainer would stumble over later, or take for something else.

    Raises:
        ConfigError: At the first of them.
    """
    for name in _AT_LEAST_ONE:
        if name in fields and not is_whole_number(fields[name], at_least=1):
            raise ConfigError(f"{name} must be a whole number of at least 1, got {fields[name]!r}.")
    for name in ("seed", "data_seed"):
        if fields.get(name) is not None and not is_whole_number(fields[name], at_least=0):
            raise ConfigError(f"{name} must be a whole number of at least 0, got {fields[name]!r}.")
    for name in ("packing", "padding_free", "shuffle_dataset"):
        if name in fields and not isinstance(fields[name], bool):
            raise ConfigError(f"{name} must be True or False, got {fields[name]!r}.")
    steps = fields.get("max_steps", -1)
    if steps != -1 and not is_whole_number(steps, at_least=1):
        raise ConfigError(
            f"max_steps must be at least 1, or -1 to count epochs instead; got {steps!r}."
        )
    for name in ("num_train_epochs", "learning_rate", "max_grad_norm", "weight_decay"):
        if name in fields and not is_finite_number(fields[name], at_least=0):
            raise ConfigError(f"{name} must be a number of at least 0, got {fields[name]!r}.")
    if fields.get("num_train_epochs") == 0:
        raise ConfigError("num_train_epochs=0 would train nothing.")
    if (
        not has_eval
        and str(getattr(value := fields.get("eval_strategy", "no"), "value", value)) != "no"
    ):
        raise ConfigError(f"eval_strategy={value!r} needs rows to evaluate on: give eval_dataset.")


def check_output_folder(output_dir: object) -> Path:
    """The folder of a run, if it can be written.

    Raises:
        ConfigError: When it is a file, or lies where nothing can be written.
    """
    if not isinstance(output_dir, str | os.PathLike) or not os.fspath(output_dir):
        raise ConfigError(f"output_dir must be the path of a folder, got {output_dir!r}.")
    folder = Path(output_dir).expanduser()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"output_dir={str(folder)!r}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir={str(folder)!r}: {existing} cannot be written to.")
    return folder
