"""Settings of a run that cannot work, found without a model.

This module refuses; it chooses no defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qlora_kit.engines.checkpointing import SPELLINGS
from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean, invalid_value
from qlora_kit.messages import Call, Setting
from qlora_kit.paths import trial_folder
from qlora_kit.training.field_checks import check_fields
from qlora_kit.values import is_finite_number, is_whole_number

__all__ = [
    "REFUSED",
    "check_evaluation",
    "check_names",
    "check_output_folder",
    "check_prompts",
    "check_values",
]

_ALPACA: Final = "AlpacaFormatter(tokenizer, {})"

#: Fields that would make TRL format or tokenize again, and what to use instead.
REFUSED: Final[Mapping[str, str | Sequence[str | Setting | Call]]] = {
    "completion_only_loss": ("Use ", Setting("response_only", True, "formatter", _ALPACA), "."),
    "assistant_only_loss": (
        "Use ",
        Call("ChatFormatter", "ChatFormatter(tokenizer)"),
        ", which trains on the assistant alone.",
    ),
    "eos_token": ("Use ", Setting("eos_token", ..., "formatter", _ALPACA), "."),
    "pad_token": "Set model.tokenizer.pad_token before formatting; padding never carries loss.",
    "chat_template_path": (
        "Use ",
        Setting("chat_template", ..., "formatter", "ChatFormatter(tokenizer, {})"),
        ".",
    ),
    "model_init_kwargs": "The model is already loaded; give these to load_quantized.",
    "dataset_kwargs": "The data is tokenized by the formatter; TRL prepares nothing.",
    "dataset_text_field": (
        "Name columns in the formatter: ",
        Setting("columns", ..., "formatter", _ALPACA),
        ".",
    ),
    "remove_unused_columns": "The data holds only the columns that training uses.",
    "eval_packing": "Evaluation rows are never packed.",
    "trust_remote_code": "Give it to load_quantized.",
    "do_train": "train_sft trains.",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint and ends the run in any case.",
}

#: Names of other trainers' arguments, and what does the same here.
_ELSEWHERE: Final[Mapping[str, str]] = {
    "group_by_length": (
        "Rows of one length need no grouping where they are packed or joined: packing=True, or "
        "padding_free=True."
    ),
    "args": "Give SFTConfig's fields as keywords: train_sft(model, rows, max_steps=60).",
    "data_collator": "The loss mask comes from the formatter: train_sft(..., formatter=...).",
    "tokenizer": "The model has it: model.tokenizer.",
    "processing_class": "The model has the tokenizer: model.tokenizer.",
    "formatting_func": "Use a formatter: train_sft(..., formatter=...); docs/data.md shows one.",
    "peft_config": "Attach the adapter first: attach_lora(model, r=16).",
}  # fmt: skip

#: As long as a path in a run's folder gets.
_LONGEST: Final = f"checkpoint-{10**9}/{'x' * 64}"
_ATTEMPTS: Final = 3
_MOST_CHARACTERS: Final = 128
#: Characters of a path that are shown.
_SHOWN: Final = 200

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
    known = {*defaults, "max_seq_length", *SPELLINGS}
    unknown = [name for name in fields if name not in known]
    if unknown:
        hints = "".join(
            f" {name!r}: {_ELSEWHERE[name]}"
            if name in _ELSEWHERE
            else f" {name!r}:{did_you_mean(name, known) or ' nothing near.'}"
            for name in unknown
        )
        raise UnknownOptionError(
            Call("train_sft", "train_sft and SFTConfig have"),
            f" no {', '.join(map(repr, unknown))}.{hints}",
            parameter=unknown[0],
            value=fields[unknown[0]],
        )
    for name, advice in REFUSED.items():
        if name in fields and fields[name] not in (None, False, defaults.get(name)):
            raise ConfigError(
                Setting(name, fields[name]),
                " has no effect here.",
                parameter=name,
                value=fields[name],
                advice=advice,
            )
    if fields.get("truncation_mode", "keep_start") != "keep_start":
        raise ConfigError(
            Setting("truncation_mode", "keep_end", "train_sft"),
            " would cut the instruction off.",
            parameter="truncation_mode",
            value="keep_end",
            advice=("Use ", Setting("truncation", "end", "train_sft"), ", 'drop' or 'error'."),
        )


def check_values(fields: Mapping[str, Any], *, has_eval: bool) -> None:
    """Refuse values that the trainer would stumble over later, or take for something else.

    Raises:
        ConfigError: At the first of them.
    """
    for name in _AT_LEAST_ONE:
        if name in fields and not is_whole_number(fields[name], at_least=1):
            raise invalid_value(name, "must be a whole number of at least 1", fields[name])
    for name in ("seed", "data_seed"):
        if fields.get(name) is not None and not is_whole_number(fields[name], at_least=0):
            raise invalid_value(name, "must be a whole number of at least 0", fields[name])
    for name in ("packing", "padding_free", "shuffle_dataset"):
        if name in fields and not isinstance(fields[name], bool):
            raise invalid_value(name, "must be True or False", fields[name])
    steps = fields.get("max_steps", -1)
    if steps != -1 and not is_whole_number(steps, at_least=1):
        raise invalid_value("max_steps", "must be at least 1, or -1 to count epochs instead", steps)
    for name in ("num_train_epochs", "learning_rate", "max_grad_norm", "weight_decay"):
        if name in fields and not is_finite_number(fields[name], at_least=0):
            raise invalid_value(name, "must be a number of at least 0", fields[name])
    if fields.get("num_train_epochs") == 0:
        raise ConfigError(
            Setting("num_train_epochs", 0, "train_sft"),
            " would train nothing.",
            parameter="num_train_epochs",
            value=0,
        )
    check_fields(fields)
    if (
        not has_eval
        and str(getattr(value := fields.get("eval_strategy", "no"), "value", value)) != "no"
    ):
        raise ConfigError(
            Setting("eval_strategy", value, "train_sft"),
            " needs rows to evaluate on: give ",
            Setting("eval_dataset"),
            ".",
            parameter="eval_strategy",
            value=value,
        )


def check_evaluation(
    fields: Mapping[str, Any], eval_dataset: Any, callbacks: Sequence[Any]
) -> None:
    """Refuse what asks for evaluations that will not happen, before data is encoded.

    Args:
        fields: ``SFTConfig`` fields by name.
        eval_dataset: The rows to evaluate on, a dictionary of them, or ``None``.
        callbacks: The run's callbacks.

    Raises:
        ConfigError: At the first of them.
    """
    for name in ("eval_on_start", "load_best_model_at_end"):
        if eval_dataset is None and fields.get(name):
            _refuse_without_rows(name, fields[name])
    metric = fields.get("metric_for_best_model")
    is_best = bool(fields.get("load_best_model_at_end"))
    kinds = [one if isinstance(one, type) else type(one) for one in callbacks]
    if any(kind.__name__ == "EarlyStoppingCallback" for kind in kinds):
        if eval_dataset is None:
            raise ConfigError(
                "EarlyStoppingCallback needs rows to evaluate on: give eval_dataset.",
                parameter="callbacks",
            )
        if metric is None and not is_best:
            raise ConfigError(
                "EarlyStoppingCallback needs to know what to watch: give "
                "metric_for_best_model='eval_loss', and load_best_model_at_end=True to keep the "
                "best weights.",
                parameter="callbacks",
            )
    if isinstance(eval_dataset, Mapping) and (is_best or metric is not None):
        names = [f"eval_{name}_loss" for name in eval_dataset]
        if f"eval_{str(metric).removeprefix('eval_')}" not in names:
            raise ConfigError(
                f"eval_dataset is a dictionary, so there is no loss of all of it to choose the "
                f"best step by: give metric_for_best_model={names[0] if names else ''!r}.",
                parameter="metric_for_best_model",
                value=metric,
            )


def _refuse_without_rows(name: str, value: Any) -> None:
    raise ConfigError(
        Setting(name, value, "train_sft"),
        " needs rows to evaluate on: give eval_dataset.",
        parameter=name,
        value=value,
    )


def check_output_folder(output_dir: object) -> Path:
    """The folder of a run, if it can be written.

    Raises:
        ConfigError: When it is a file, or lies where nothing can be written.
    """
    if not isinstance(output_dir, str | os.PathLike) or not os.fspath(output_dir):
        raise invalid_value("output_dir", "must be the path of a folder", output_dir)
    try:
        folder = Path(output_dir).expanduser()
        _try_out(folder)
    # RuntimeError: a home that nobody has; ValueError: a zero byte; TypeError: bytes.
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        shown = os.fspath(output_dir)
        if len(shown) > _SHOWN:
            shown = f"{shown[:_SHOWN]}... ({len(shown)} characters)"
        raise ConfigError(
            Setting("output_dir", shown),
            f": {_explain(error, shown)}. Give the path of a folder of your own.",
            parameter="output_dir",
            value=output_dir,
        ) from error
    return folder


def _explain(error: Exception, shown: str) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        path = Path(shown).expanduser()
        file = next((one for one in (path, *path.parents) if one.exists()), path)
        return f"{file} is a file, not a folder"
    said = str(getattr(error, "strerror", None) or error).rstrip(".")
    return f"it cannot be written to ({said})"


def _try_out(folder: Path) -> None:
    """Only the system knows whether a place takes files, and how long a path may be."""
    for attempt in range(_ATTEMPTS):
        try:
            with trial_folder(folder):
                place = folder / f".{uuid.uuid4().hex}"
                place.touch()
                place.unlink()
                with contextlib.suppress(FileNotFoundError):
                    (folder / _LONGEST).stat()
            return
        except FileNotFoundError:
            # Another rank may have removed the folder that it had made to try it out.
            if attempt == _ATTEMPTS - 1:
                raise


def check_prompts(prompts: Any, every: Any, longest: int | None = None) -> tuple[str, ...]:
    """The prompts to ask, if they can be.

    Args:
        prompts: Texts, or one text.
        every: After how many steps.
        longest: Tokens that the model was loaded for, where there is one.

    Raises:
        ConfigError: When they are no texts, or ``every`` is no number of steps.
    """
    given = (prompts,) if isinstance(prompts, str) else prompts
    given = () if given is None else given
    if not isinstance(given, Sequence) or not all(isinstance(p, str) and p for p in given):
        raise invalid_value("sample_prompts", "must be texts to ask the model", prompts)
    for one in given:
        # Ordinary text has four characters a token, and no text a hundred.
        if longest is not None and len(one) > _MOST_CHARACTERS * longest:
            raise ConfigError(
                f"sample_prompts has a text of {len(one):,} characters, which is surely longer "
                f"than the {longest:,} tokens that the model was loaded for. Ask something "
                "shorter, or load it with a larger max_seq_length.",
                parameter="sample_prompts",
                value=prompts,
            )
    if every is not None and not is_whole_number(every, at_least=1):
        raise invalid_value("sample_steps", "must be a whole number of at least 1", every)
    if every is not None and not given:
        raise ConfigError(
            "sample_steps says how often to ask sample_prompts: give those as well.",
            parameter="sample_steps",
            value=every,
        )
    return tuple(given)
