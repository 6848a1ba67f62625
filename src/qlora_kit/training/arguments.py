"""From keyword arguments to a complete ``SFTConfig``.

This module knows which fields exist, which of them this library takes over because the
data is already tokenized when TRL sees it, and which defaults the device allows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause
from qlora_kit.config import SCRIPT_TRAINING_DEFAULTS
from qlora_kit.data.tokens.truncation import check_limits
from qlora_kit.engines.checkpointing import spell_as_installed, unify_spellings
from qlora_kit.engines.trainer_mixins import has_triton_loss
from qlora_kit.errors import ConfigError
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Setting
from qlora_kit.training.validation import REFUSED, check_names

if TYPE_CHECKING:
    import torch
    from trl import SFTConfig

__all__ = [
    "DataOptions",
    "Optimizer",
    "TrainingSettings",
    "build_arguments",
    "choose_optimizer",
    "read_settings",
]

logger = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The keyword arguments of a run, sorted by who carries them out.

    Attributes:
        data: What this library's own data code does.
        optimizer: The optimizer asked for, ``None`` for the default.
        trainer: The other ``SFTConfig`` fields that were given.
    """

    data: DataOptions
    optimizer: Any
    trainer: Mapping[str, Any]


class UnsavedToken(str):
    """A token that ``training_args.bin``, which every checkpoint has, holds no copy of."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(None), ()

    def __copy__(self) -> UnsavedToken:
        return self

    def __deepcopy__(self, memo: Any) -> UnsavedToken:
        return self


def read_settings(fields: Mapping[str, Any], truncation: str, longest: int) -> TrainingSettings:
    """Sort the fields; those without effect are left out.

    Args:
        fields: ``SFTConfig`` fields by name, and ``max_seq_length``, which was ``max_length``.
        truncation: As for ``train_sft``.
        longest: Tokens of the longest example where neither is given.

    Raises:
        UnknownOptionError: For names that are not ``SFTConfig`` fields, all of them at once.
        ConfigError: For fields that contradict each other, or how the data is prepared here.
    """
    check_names(fields)
    fields = unify_spellings(fields)
    given = [fields[name] for name in ("max_length", "max_seq_length") if name in fields]
    max_length = longest if not given or given[0] is None else given[0]
    check_limits(max_length, truncation)
    own = {field.name for field in dataclasses.fields(DataOptions)}
    options = {name: value for name, value in fields.items() if name in own}
    elsewhere = {*own, *REFUSED, "max_seq_length", "truncation_mode", "optim"}
    return TrainingSettings(
        DataOptions(**{**options, "max_length": max_length, "truncation": truncation}),
        fields.get("optim"),
        {name: value for name, value in fields.items() if name not in elsewhere},
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
    if merged.get("hub_token") is not None:
        merged["hub_token"] = UnsavedToken(merged["hub_token"])
    if merged.get("loss_type", "nll") != "nll" and not has_triton_loss(device.type):
        raise ConfigError(
            Setting("loss_type", merged["loss_type"], "train_sft"),
            f" is computed by TRL's triton kernel, which does not run on {device.type} here.",
            parameter="loss_type",
            value=merged["loss_type"],
            advice=("Use ", Setting("loss_type", "nll", "train_sft"), "."),
        )
    try:
        args = SFTConfig(
            output_dir=str(output_dir),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            max_length=None,
            **spell_as_installed(merged),
        )
    # It runs accelerate's and fsdp's own parsers, which raise what their input makes them.
    except Exception as error:
        raise ConfigError(f"SFTConfig refuses these settings: {describe_cause(error)}") from error
    _take_one_card(args, device)
    return args


def _take_one_card(args: SFTConfig, device: torch.device) -> None:
    """This process trains on the device that the model is on, and on no other.

    transformers counts all cards that one process sees, and would spread batches over them; alone
    it takes the first card, whichever is the current one.
    """
    import torch

    if args.n_gpu > 1:
        logger.info(
            "%d cards are visible, and one process trains on one: %s. To train on all of them: "
            "torchrun --nproc-per-node %d script.py.", args.n_gpu, device, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1
    if device.type == "cuda" and args.world_size == 1:
        torch.cuda.set_device(device)
        args.distributed_state.device = device
    # torch.load takes no number of a CPU.
    args.__dict__["_setup_devices"] = device


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
        # Every adapter is in every step; looking for those that are not takes a walk each time.
        "ddp_find_unused_parameters": False,
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
