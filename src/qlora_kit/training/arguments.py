"""From keyword arguments to a complete ``SFTConfig``.

This module knows which fields exist, which of them this library takes over because the
data is already tokenized when TRL sees it, and which defaults the device allows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.config import SCRIPT_TRAINING_DEFAULTS
from qlora_kit.engines.portable_loss import has_triton_loss
from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean
from qlora_kit.results import AdaptedModel

if TYPE_CHECKING:
    import torch
    from trl import SFTConfig

__all__ = [
    "DataOptions",
    "Optimizer",
    "build_arguments",
    "check_output_folder",
    "check_values",
    "choose_optimizer",
    "take_data_options",
]

logger = logging.getLogger(__name__)

#: Fields that would make TRL format or tokenize again, and what to use instead.
_REFUSED: Final[Mapping[str, str]] = {
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

#: Optimizers of bitsandbytes that are left to a GPU.
_ON_GPU: Final = (
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "paged_ademamix_8bit", "paged_ademamix_32bit",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """``SFTConfig`` fields that this library's own data code carries out."""

    max_length: int
    packing: bool = False
    packing_strategy: str = "bfd"
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    dataset_num_proc: int | None = None
    shuffle_dataset: bool = False
    truncation: str = "end"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer that will run, and why it is not the one asked for."""

    name: str
    note: str = ""


def take_data_options(model: AdaptedModel, fields: dict[str, Any], truncation: str) -> DataOptions:
    """Check names and take the data fields out of ``fields``.

    Raises:
        UnknownOptionError: For names that are no ``SFTConfig`` field, all of them at once.
        ConfigError: For fields that contradict how the data is prepared here.
    """
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)} | {"max_seq_length"}
    unknown = [name for name in fields if name not in known]
    if unknown:
        hints = "".join(
            f" {name!r}:{did_you_mean(name, known) or ' nothing near.'}" for name in unknown
        )
        raise UnknownOptionError(
            f"train_sft and SFTConfig have no {', '.join(map(repr, unknown))}.{hints}"
        )
    for name, advice in _REFUSED.items():
        default = {f.name: f.default for f in dataclasses.fields(SFTConfig)}.get(name)
        if name in fields and fields[name] not in (None, False, default):
            raise ConfigError(f"{name}={fields[name]!r} has no effect here. {advice}")
        fields.pop(name, None)
    if fields.pop("truncation_mode", "keep_start") != "keep_start":
        raise ConfigError(
            "truncation_mode='keep_end' would cut the instruction off. Use truncation='end', "
            "'drop' or 'error'."
        )
    longest = fields.pop("max_seq_length", None)
    max_length = fields.pop("max_length", longest)
    options = DataOptions(
        max_length=model.max_seq_length if max_length is None else max_length,
        truncation=truncation,
        **{
            field.name: fields.pop(field.name)
            for field in dataclasses.fields(DataOptions)
            if field.name in fields
        },
    )
    if not isinstance(options.max_length, int) or options.max_length < 2:
        raise ConfigError(f"max_length must be at least 2 tokens, got {options.max_length!r}.")
    if options.truncation not in ("end", "drop", "error"):
        raise ConfigError(f"truncation must be 'end', 'drop' or 'error', got {truncation!r}.")
    return options


def check_values(fields: Mapping[str, Any], *, has_eval: bool) -> None:
    """Refuse values that the trainer would stumble over later, or take for something else.

    Raises:
        ConfigError: At the first of them.
    """
    for name in _AT_LEAST_ONE:
        if name in fields and not _is_whole(fields[name], at_least=1):
            raise ConfigError(f"{name} must be a whole number of at least 1, got {fields[name]!r}.")
    for name in ("seed", "data_seed"):
        if fields.get(name) is not None and not _is_whole(fields[name], at_least=0):
            raise ConfigError(f"{name} must be a whole number of at least 0, got {fields[name]!r}.")
    for name in ("packing", "padding_free", "shuffle_dataset"):
        if name in fields and not isinstance(fields[name], bool):
            raise ConfigError(f"{name} must be True or False, got {fields[name]!r}.")
    steps = fields.get("max_steps", -1)
    if steps != -1 and not _is_whole(steps, at_least=1):
        raise ConfigError(
            f"max_steps must be at least 1, or -1 to count epochs instead; got {steps!r}."
        )
    for name in ("num_train_epochs", "learning_rate", "max_grad_norm", "weight_decay"):
        if name in fields and not _is_finite(fields[name], at_least=0):
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


def _is_whole(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_finite(value: object, *, at_least: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= at_least
    )


def choose_optimizer(asked: str | None, device: torch.device) -> Optimizer:
    """8-bit Adam where it is worth having, PyTorch's AdamW elsewhere.

    On a CPU bitsandbytes 0.50's 8-bit AdamW learns alike and takes 15 times as long as PyTorch's
    fused one, a sixth of a small model's step, to save 6 bytes per trained parameter. Before 0.50
    it goes through triton there, which fails or compiles for minutes; paged ones need CUDA.
    """
    # transformers' OptimizerNames is taken as well as its value.
    wanted = str(getattr(asked, "value", asked) or "adamw_8bit")
    if wanted not in _ON_GPU:
        return Optimizer(wanted)
    if device.type in ("cuda", "xpu") and importlib.util.find_spec("bitsandbytes") is not None:
        return Optimizer(wanted)
    if importlib.util.find_spec("bitsandbytes") is None:
        reason = "bitsandbytes is not installed"
    elif device.type == "cpu":
        reason = "on a CPU bitsandbytes' takes many times as long, where it runs at all"
    else:
        reason = f"bitsandbytes' optimizers do not run on {device.type}"
    return Optimizer("adamw_torch", f"{wanted} -> adamw_torch: {reason}")


def build_arguments(
    model: AdaptedModel,
    fields: Mapping[str, Any],
    *,
    output_dir: Path,
    device: torch.device,
    optimizer: Optimizer,
    has_eval: bool,
) -> SFTConfig:
    """The trainer's configuration: script defaults, what the device allows, the user's fields.

    Raises:
        ConfigError: When ``SFTConfig`` refuses a value.
    """
    from trl import SFTConfig

    merged = {**SCRIPT_TRAINING_DEFAULTS, **_device_defaults(model, device)}
    if "num_train_epochs" in fields and "max_steps" not in fields:
        del merged["max_steps"]
    # The other one's default gives way; left out, TRL would turn bf16 on wherever fp16 is off.
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        if fields.get(name):
            merged[other] = False
    if has_eval:
        merged.update(_evaluation_defaults({**merged, **fields}))
    merged.update(fields)
    merged["optim"] = optimizer.name
    if merged.get("loss_type", "nll") != "nll" and not has_triton_loss(device.type):
        raise ConfigError(
            f"loss_type={merged['loss_type']!r} is computed by TRL's triton kernel, which does "
            f"not run on {device.type} here. Use loss_type='nll'."
        )
    try:
        return SFTConfig(
            output_dir=str(output_dir),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            max_length=None,
            **merged,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"SFTConfig refuses these settings: {error}") from error


def _device_defaults(model: AdaptedModel, device: torch.device) -> dict[str, Any]:
    checkpointing = model.adapter.use_gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = device.type != "cpu"
    return {
        "bf16": model.base.compute_dtype == "bfloat16",
        # float16 needs a loss scaler, which exists for GPUs only.
        "fp16": model.base.compute_dtype == "float16" and device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "gradient_checkpointing": bool(checkpointing),
    }


def _evaluation_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Four evaluations over the run, or one per epoch; losses only, never the logits."""
    defaults: dict[str, Any] = {
        "prediction_loss_only": True,
        "per_device_eval_batch_size": fields["per_device_train_batch_size"],
    }
    if "eval_strategy" in fields:
        return defaults
    if "eval_steps" in fields:
        return {**defaults, "eval_strategy": "steps"}
    max_steps = fields.get("max_steps", -1)
    if max_steps and max_steps > 0:
        return {**defaults, "eval_strategy": "steps", "eval_steps": max(1, max_steps // 4)}
    return {**defaults, "eval_strategy": "epoch"}
