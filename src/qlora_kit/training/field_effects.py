"""Which fields of ``SFTConfig`` do something, and when: none is passed over in silence.

Every field of the tested version stands here or in :data:`validation.REFUSED`. One that a newer
version has besides goes to its trainer as it is, which is said.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

from qlora_kit.engines.checkpointing import SPELLINGS
from qlora_kit.training.optimizer_options import find_unread_options, reads_option

__all__ = ["ALWAYS", "NOWHERE", "ONLY_TRL", "WHEN", "Situation", "find_idle_fields"]


@dataclasses.dataclass(frozen=True)
class Situation:
    """What decides whether a field does something.

    Attributes:
        args: The run's ``SFTConfig``.
        has_fast_step: Whether the engine's own step computes, and not TRL's.
        has_eval: Whether there are rows to evaluate on.
        has_metrics: Whether ``compute_metrics`` was given.
        has_experts: Whether the model routes its tokens.
        is_packed: Whether rows hold several examples.
        is_resuming: Whether ``resume_from_checkpoint`` was given.
        world: Processes that train together.
    """

    args: Any
    has_fast_step: bool = False
    has_eval: bool = False
    has_metrics: bool = False
    has_experts: bool = False
    is_packed: bool = False
    is_resuming: bool = False
    world: int = 1


#: What the trainer or this library's data code does in every run that has an occasion for it.
ALWAYS: Final = (
    "output_dir", "per_device_train_batch_size", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "weight_decay",
    "gradient_accumulation_steps", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16",
    "tf32", "gradient_checkpointing", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "use_liger_kernel", "neftune_noise_alpha", "torch_empty_cache_steps",
    "auto_find_batch_size", "logging_strategy", "logging_first_step", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "log_level", "disable_tqdm", "report_to", "eval_strategy",
    "save_only_model", "save_strategy", "save_total_limit", "push_to_hub",
    "load_best_model_at_end", "full_determinism", "seed", "data_seed", "use_cpu",
    "accelerator_config", "parallelism_config", "dataloader_drop_last", "dataloader_num_workers",
    "train_sampling_strategy", "fsdp", "deepspeed", "debug", "skip_memory_metrics",
    "dataset_num_proc", "max_length", "shuffle_dataset", "packing", "padding_free",
    "truncation_mode", "loss_type", "activation_offloading", "resume_from_checkpoint",
)  # fmt: skip

#: What TRL's own step does, and this engine's not: why.
ONLY_TRL: Final[Mapping[str, str]] = {
    "gradient_checkpointing_kwargs": (
        "the native step recomputes layers in its own way; see the plan's checkpointing"
    ),
    "pad_to_multiple_of": "the native step lays examples end to end and fills up itself",
    "dataloader_pin_memory": "the native step pins its micro-batches itself, on a GPU",
    "average_tokens_across_devices": "the native step's loss is the mean over all ranks' tokens",
    **dict.fromkeys(
        (
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
        ),
        "the native step adds gradients up without DDP",
    ),
}

#: What nothing here does: why.
NOWHERE: Final[Mapping[str, str]] = {
    "use_cache": "a training step keeps no cache",
    "bf16_full_eval": "evaluations during a training compute as it does",
    "fp16_full_eval": "evaluations during a training compute as it does",
    "do_predict": "train_sft only trains and evaluates; generate_batch answers",
    "length_column_name": "lengths are counted from the token ids",
    "local_rank": "the launcher's environment says which process this is",
}


def _reads(name: str, one: Situation) -> bool:
    return reads_option(one.args, name)


def _has_trackio(one: Situation) -> bool:
    return "trackio" in one.args.report_to


#: What needs an occasion: whether there is one, and what it would take.
WHEN: Final[Mapping[str, tuple[Callable[[Situation], bool], str]]] = {
    **dict.fromkeys(
        (
            "eval_delay",
            "per_device_eval_batch_size",
            "eval_on_start",
            "do_eval",
            "metric_for_best_model",
        ),
        (lambda one: one.has_eval, "there is no eval_dataset"),
    ),
    "prediction_loss_only": (
        lambda one: one.has_eval and not one.has_metrics,
        "it needs an eval_dataset, and no compute_metrics, which looks at scores",
    ),
    "eval_steps": (
        lambda one: one.has_eval and _word(one.args.eval_strategy) == "steps",
        "it needs an eval_dataset and eval_strategy='steps'",
    ),
    **dict.fromkeys(
        (
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "label_names",
        ),
        (lambda one: one.has_metrics, "it is about compute_metrics, which was not given"),
    ),
    "greater_is_better": (
        lambda one: bool(one.args.load_best_model_at_end or one.args.metric_for_best_model),
        "it needs metric_for_best_model",
    ),
    "num_train_epochs": (lambda one: one.args.max_steps <= 0, "max_steps counts instead"),
    "warmup_steps": (
        lambda one: _word(one.args.lr_scheduler_type) != "constant",
        "the constant schedule has no warm-up; 'constant_with_warmup' has",
    ),
    "optim_target_modules": (
        lambda one: any(word in _word(one.args.optim) for word in ("galore", "apollo")),
        "it is about GaLore's and APOLLO's optimizers",
    ),
    "optim_args": (
        lambda one: not find_unread_options(one.args),
        "the optimizer that runs does not read it",
    ),
    **{
        name: (functools.partial(_reads, name), "the optimizer that runs does not read it")
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon")
    },
    "logging_steps": (
        lambda one: _word(one.args.logging_strategy) == "steps",
        "it needs logging_strategy='steps'",
    ),
    "save_steps": (
        lambda one: _word(one.args.save_strategy) == "steps",
        "it needs save_strategy='steps'",
    ),
    "run_name": (lambda one: bool(one.args.report_to), "it is a tracker's, and report_to has none"),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        (_has_trackio, "it is trackio's, and report_to has no 'trackio'"),
    ),
    **dict.fromkeys(
        (
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        (lambda one: one.args.push_to_hub, "it needs push_to_hub=True"),
    ),
    "liger_kernel_config": (lambda one: one.args.use_liger_kernel, "it needs use_liger_kernel"),
    **dict.fromkeys(
        (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_in_order",
            "dataloader_multiprocessing_context",
        ),
        (lambda one: one.args.dataloader_num_workers > 0, "it needs dataloader_num_workers"),
    ),
    **dict.fromkeys(
        (
            "ddp_backend",
            "ddp_timeout",
            "log_level_replica",
            "log_on_each_node",
            "save_on_each_node",
        ),
        (lambda one: one.world > 1, "one process trains alone"),
    ),
    "fsdp_config": (lambda one: bool(one.args.fsdp), "it needs fsdp"),
    "router_aux_loss_coef": (lambda one: one.has_experts, "the model has no experts"),
    "packing_strategy": (lambda one: one.is_packed, "it needs packing=True"),
    **dict.fromkeys(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        (lambda one: one.is_resuming, "it needs resume_from_checkpoint"),
    ),
}


def find_idle_fields(fields: Mapping[str, Any], situation: Situation) -> dict[str, str]:
    """Fields that were given and do nothing in this run, each with the reason.

    Args:
        fields: What was given, by name.
        situation: The run.
    """
    from trl import SFTConfig

    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    idle: dict[str, str] = {}
    for given, value in fields.items():
        # Under the name that these tables have; a field that is another function's is no news.
        name = SPELLINGS.get(given, given)
        default = defaults.get(name, defaults.get(given))
        is_asked = bool(value) or (value is False and default is True)
        if given not in defaults or not is_asked or value == default:
            continue
        reason = _explain_idle(name, value, situation)
        if reason:
            idle[given] = reason
    return idle


def _explain_idle(name: str, value: Any, situation: Situation) -> str:
    """Why a field does nothing; empty where it does something."""
    if name in NOWHERE:
        return NOWHERE[name]
    if name in ONLY_TRL and situation.has_fast_step:
        # The native step does this one anyway.
        return "" if value == {"use_reentrant": False} else ONLY_TRL[name]
    if name == "gradient_checkpointing_kwargs" and not situation.args.gradient_checkpointing:
        return "nothing is recomputed: gradient_checkpointing is off"
    if name in WHEN:
        holds, reason = WHEN[name]
        return "" if holds(situation) else reason
    if name in ALWAYS or name in ONLY_TRL:
        return ""
    return "not known here: TRL or transformers is newer, and got it as it is"


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
