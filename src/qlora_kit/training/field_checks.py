"""Types and ranges of ``SFTConfig``'s fields, which TRL itself takes as they come.

Read from the annotations of the installed version, so that a new field is checked as well.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from qlora_kit.boundaries import describe_cause
from qlora_kit.engines.checkpointing import SPELLINGS
from qlora_kit.errors import ConfigError, MissingDependencyError, did_you_mean
from qlora_kit.messages import Setting
from qlora_kit.training.optimizer_options import check_optimizer_options

__all__ = ["check_fields"]

#: Probabilities and decay rates: 1 would mean that nothing is ever learned or forgotten.
_BELOW_ONE: Final = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
_ABOVE_ZERO: Final = (
    "adam_epsilon", "neftune_noise_alpha", "eval_accumulation_steps", "torch_empty_cache_steps",
    "dataloader_prefetch_factor", "dataset_num_proc", "pad_to_multiple_of", "ddp_bucket_cap_mb",
    "ddp_timeout",
)  # fmt: skip
#: Where transformers gives a number below zero a meaning.
_MAY_BE_NEGATIVE: Final = ("max_steps", "local_rank")
#: Carried out, or refused, by others; or looser in use than annotated.
_UNCHECKED: Final = ("output_dir", "max_length", "resume_from_checkpoint")
#: Text with a meaning, where the annotation has any text.
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
}
_COMPILE_MODES: Final = (
    "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs",
)  # fmt: skip
#: Trackers whose check transformers names in another way.
_TRACKER_MODULES: Final = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
#: Far more than any machine has cores; each is a process.
_MOST_PROCESSES: Final = 512


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse values of another type than a field has, or out of its range.

    Args:
        fields: Fields of ``SFTConfig`` by name; names it does not have are passed over.

    Raises:
        ConfigError: At the first of them.
    """
    hints, choices = _read_fields()
    for name, value in fields.items():
        if name not in hints or name in _UNCHECKED:
            continue
        # Annotated as text alone, and read as either of these as well.
        if name in ("fsdp", "debug") and (
            isinstance(value, bool)
            or (isinstance(value, list) and all(isinstance(one, str) for one in value))
        ):
            continue
        if not _fits(value, hints[name]):
            _refuse(name, _spell(hints[name]), value)
        known = _WORDS.get(name) or choices.get(name) or _list_members(hints[name])
        written = value.value if isinstance(value, enum.Enum) else value
        if known and isinstance(written, str) and written not in known:
            _refuse(name, f"one of {', '.join(map(repr, known))}", value)
        if _is_real(value):
            _check_range(name, value)
    _check_compiling(fields)
    _check_schedule(fields)
    _check_trackers(fields)
    check_optimizer_options(fields)


@cache
def _read_fields() -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Annotations and choices by field."""
    from trl import SFTConfig

    hints = get_type_hints(SFTConfig)
    # Before transformers had the newer name of a field, it is checked as the older one.
    hints = {newer: hints[older] for newer, older in SPELLINGS.items()} | hints
    return hints, {
        field.name: tuple(field.metadata.get("choices") or ())
        for field in dataclasses.fields(SFTConfig)
    }


def _check_range(name: str, value: Any) -> None:
    try:
        finite = math.isfinite(value)
    # A whole number of more than 308 digits.
    except OverflowError:
        finite = False
    if not finite or abs(value) >= 2**63:
        _refuse(name, "a number that can be computed with", value)
    if name in _BELOW_ONE and not 0 <= value < 1:
        _refuse(name, "a number from 0 up to (not including) 1", value)
    if name in _ABOVE_ZERO and value <= 0:
        _refuse(name, "above 0", value)
    if name not in _MAY_BE_NEGATIVE and value < 0:
        _refuse(name, "at least 0", value)
    if name in ("dataset_num_proc", "dataloader_num_workers") and value > _MOST_PROCESSES:
        _refuse(name, f"at most {_MOST_PROCESSES} processes", value)
    if name in ("seed", "data_seed") and value >= 2**32:
        _refuse(name, "below 2**32, which NumPy's generator takes", value)


def _check_compiling(fields: Mapping[str, Any]) -> None:
    mode, backend = fields.get("torch_compile_mode"), fields.get("torch_compile_backend")
    if mode is not None and mode not in _COMPILE_MODES:
        _refuse("torch_compile_mode", f"one of {', '.join(map(repr, _COMPILE_MODES))}", mode)
    if backend is not None:
        from torch._dynamo import list_backends

        known = list_backends(exclude_tags=None)
        if backend not in known:
            _refuse("torch_compile_backend", f"one of {', '.join(map(repr, known))}", backend)


def _check_schedule(fields: Mapping[str, Any]) -> None:
    """Make the schedule once for an optimizer of one number: its arguments are its own."""
    options = fields.get("lr_scheduler_kwargs") or {}
    if not isinstance(options, Mapping) or not (options or fields.get("lr_scheduler_type")):
        return
    import torch
    from transformers import get_scheduler

    asked = fields.get("lr_scheduler_type", "linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        get_scheduler(
            getattr(asked, "value", asked),
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(options) or None,
        )
    # Each schedule is a function that takes, and trips over, arguments of its own.
    except Exception as error:
        if not options:
            if isinstance(error, TypeError):
                raise ConfigError(
                    Setting("lr_scheduler_type", getattr(asked, "value", asked)),
                    f" needs lr_scheduler_kwargs: {describe_cause(error)}",
                    parameter="lr_scheduler_type",
                    value=asked,
                ) from error
            # A name that there is not is refused with all of those that there are.
            return
        raise ConfigError(
            Setting("lr_scheduler_kwargs", options),
            f" does not go with the schedule {getattr(asked, 'value', asked)!r}: "
            f"{describe_cause(error)}",
            parameter="lr_scheduler_kwargs",
            value=options,
        ) from error


def _check_trackers(fields: Mapping[str, Any]) -> None:
    """Refuse trackers that transformers does not know, or that are not installed."""
    asked = fields.get("report_to")
    names = [asked] if isinstance(asked, str) else list(asked or ())
    if not set(names) - {"none", "all"}:
        return
    from transformers.integrations import integration_utils as trackers

    known = (*trackers.INTEGRATION_TO_CALLBACK, "all", "none")
    for name in names:
        if name not in known:
            raise ConfigError(
                Setting("report_to", asked),
                f": there is no tracker {name!r}.{did_you_mean(name, known)} transformers knows "
                f"{', '.join(known)}.",
                parameter="report_to",
                value=asked,
            )
        is_there = getattr(trackers, f"is_{_TRACKER_MODULES.get(name, name)}_available", None)
        if is_there is not None and not is_there():
            raise MissingDependencyError(
                Setting("report_to", asked),
                f": {name} is not installed here. Install it, or leave it out: losses are in "
                "report.html and in the manifest anyway.",
                parameter="report_to",
                value=asked,
            )


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value is item or value == item for item in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return _is_real(value)
    kind = hint if origin is None else origin
    if not isinstance(kind, type):
        return True
    if kind is list:
        parts = get_args(hint)
        return isinstance(value, list | tuple) and (
            not parts or all(_fits(item, parts[0]) for item in value)
        )
    if kind is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return isinstance(value, kind)


def _list_members(hint: Any) -> tuple[str, ...]:
    """The values of an annotation's enumeration."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    return tuple(str(member.value) for kind in kinds for member in kind)


def _spell(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        words = [_spell(part) for part in get_args(hint) if not _is_enumeration(part)]
        return " or ".join(dict.fromkeys(words))
    known = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    if hint in known:
        return known[hint]
    return "None" if hint is type(None) else f"a {getattr(hint, '__name__', hint)}"


def _is_enumeration(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, enum.Enum)


def _refuse(name: str, expected: str, value: object) -> NoReturn:
    shown = f"a {type(value).__name__}" if "token" in name and value else repr(value)
    if len(shown) > 200:
        shown = f"a {type(value).__name__} of {len(shown):,} characters"
    raise ConfigError(
        Setting(name), f" must be {expected}, got {shown}.", parameter=name, value=value
    )
