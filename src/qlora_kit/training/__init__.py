"""Training: TRL's ``SFTTrainer`` on rows that are already token ids and labels.

This stage joins data, configuration and an engine's trainer, watches the run and reports.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit import device as device_module
from qlora_kit import ranks
from qlora_kit.engines.base import TrainJob
from qlora_kit.engines.contract import quietly
from qlora_kit.errors import ConfigError, DataError, invalid_value
from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.results import TrainResult
from qlora_kit.training.arguments import (
    DataOptions,
    build_arguments,
    choose_optimizer,
    read_settings,
)
from qlora_kit.training.examples import (
    TrainingData,
    make_collator,
    prepare_examples,
    prepare_training_data,
)
from qlora_kit.training.identity import identify_run, make_run_id
from qlora_kit.training.output_lock import check_unused, hold_folder
from qlora_kit.training.recipe_record import describe_recipe
from qlora_kit.training.resumption import (
    Resumption,
    choose_checkpoint,
    find_checkpoints,
)
from qlora_kit.training.run import Run, run_training
from qlora_kit.training.validation import (
    check_evaluation,
    check_output_folder,
    check_prompts,
    check_values,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["check_training", "train_sft"]

logger = logging.getLogger(__name__)


def train_sft(
    model: AdaptedModel,
    train_dataset: Any,
    *,
    formatter: Any = None,
    columns: Mapping[str, str] | None = None,
    output_dir: str | os.PathLike[str] = "outputs",
    eval_dataset: Any = None,
    packing: bool = False,
    truncation: str = "end",
    plan: Any = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
    sample_prompts: str | Sequence[str] | None = None,
    sample_steps: int | None = None,
    resume_from_checkpoint: bool | str | os.PathLike[str] | None = None,
    resume_with_changes: bool = False,
    **sft_config: Any,
) -> TrainResult:
    """Fine-tune the adapter with TRL's ``SFTTrainer`` and the classic script's settings.

    The loss of an optimizer step is the mean over every trained token of its effective batch,
    however it is split into micro-batches. What was not asked for: 2 rows x 4 accumulation
    steps, 60 steps, learning rate 2e-4 with linear decay after 5 warm-up steps, weight decay
    0.01, 8-bit AdamW where the device has it, seed 3407.

    Args:
        model: What :func:`~qlora_kit.attach_lora` returned.
        train_dataset: What ``formatter.load`` returned, or anything it takes, such as a file's
            path, with Alpaca's columns, ``messages`` or ``conversations``, ``prompt`` and
            ``completion``, a ``text`` column, or ``input_ids`` (and ``labels``, and
            ``seq_lengths`` where ``pack_examples`` packed them) already.
        formatter: Overrides the formatter that the rows carry.
        columns: Which column holds which role, where neither a formatter nor the rows say so.
        output_dir: Checkpoints and ``qlora_kit_manifest.json`` go here.
        eval_dataset: Held-out rows, or a dictionary of them; evaluated four times over the run
            unless ``eval_strategy`` or ``eval_steps`` says otherwise.
        packing: Fill rows of ``max_length`` tokens with several examples, which never see each
            other.
        truncation: For examples beyond ``max_length``: ``"end"`` cuts them, ``"drop"`` leaves
            them out, ``"error"`` raises. Counted and reported in every case.
        plan: How the native engine computes steps; none of it changes the maths. ``None``
            chooses by memory and says what it chose; ``False`` trains through TRL and peft alone;
            a dictionary or a :class:`~qlora_kit.engines.native.fast.plan_options.FastPlan` pins
            choices, for example ``{"checkpointing": "full", "weights": "nf4"}``.
        callbacks: ``TrainerCallback`` objects or classes.
        compute_metrics: transformers' function of an ``EvalPrediction`` (scores of the tokens,
            labels) to figures, which every evaluation logs. Evaluations then hold all scores, which
            takes memory; for answers there is :func:`~qlora_kit.evaluate`.
        sample_prompts: Texts that the model is asked before and after, in the formatter's words;
            the answers are in ``result.samples`` and in ``report.html``.
        sample_steps: Ask them every so many steps as well.
        resume_from_checkpoint: ``True`` for the last whole checkpoint in ``output_dir``, ``"auto"``
            for the same where there is one and a new run where not, or a path. It must be of this
            run: the same rows, template, base, adapter and settings, but for the number of steps
            and whatever only concerns logging, saving and memory.
        resume_with_changes: Go on from another run's checkpoint all the same, with the rows and
            settings given here from its step on.
        **sft_config: Any field of TRL's ``SFTConfig``, by its own name.

    Returns:
        Losses per step, tokens, seconds, memory, versions and the manifest's path. After Ctrl-C,
        SIGTERM, SIGHUP or SIGUSR1 the same for the steps that were done, with the checkpoint to
        resume from.

    Raises:
        ConfigError: When the model has no adapter to train or a setting cannot work;
            ``UnknownOptionError`` for unknown fields, with the nearest name.
        DataError: When rows are missing or malformed, or none has a token to train on.
        TrainingError: When the device runs out of memory; nothing is changed silently. When
            another training writes to ``output_dir``.
    """
    _check_model(model)
    fields = {**sft_config, "packing": packing}
    check_values(fields, has_eval=eval_dataset is not None)
    callbacks = _check_callbacks(callbacks)
    _check_columns(columns)
    prompts = check_prompts(sample_prompts, sample_steps, model.max_seq_length)
    if compute_metrics is not None and (not callable(compute_metrics) or eval_dataset is None):
        raise ConfigError(
            "compute_metrics is a function of transformers' EvalPrediction, and needs rows to "
            "evaluate on: give eval_dataset.",
            parameter="compute_metrics",
            value=compute_metrics,
        )
    _check_insisting(resume_with_changes, resume_from_checkpoint)
    check_evaluation(fields, eval_dataset, callbacks)
    settings = read_settings(fields, truncation, model.max_seq_length)
    options = settings.data
    folder = check_output_folder(output_dir)
    ranks.join()
    device = device_module.get_device()
    if device.type == "cpu" and sft_config.get("activation_offloading"):
        raise ConfigError(
            "activation_offloading=True moves activations from a GPU to the CPU, and this run is "
            "on the CPU. Leave it out.",
            parameter="activation_offloading",
            value=True,
        )
    if sft_config.get("use_cpu") and device.type != "cpu":
        raise ConfigError(
            Setting("use_cpu", True, "train_sft"),
            f": the model is on {device}. Hide the cards before anything is imported, with "
            "CUDA_VISIBLE_DEVICES= in the environment, or leave it out.",
            parameter="use_cpu",
            value=True,
        )
    optimizer = choose_optimizer(settings.optimizer, device)
    if optimizer.note:
        logger.info("Optimizer: %s.", optimizer.note)
    with quietly(model.engine):
        args = build_arguments(
            model,
            settings.trainer,
            output_dir=folder,
            device=device,
            optimizer=optimizer,
            has_eval=eval_dataset is not None,
        )
    if compute_metrics is not None:
        args.prediction_loss_only = False
    # All ranks are one run.
    new_id = ranks.share("run id", make_run_id)
    # One process of several that train together holds the folder for all.
    with hold_folder(folder, new_id) if args.process_index == 0 else contextlib.nullcontext():
        found = find_checkpoints(resume_from_checkpoint, folder, model)
        data = prepare_training_data(model, train_dataset, formatter, options, args.seed, columns)
        eval_rows = _prepare_eval(model, eval_dataset, data, options)
        is_flat = data.is_packed or options.padding_free
        job = TrainJob(
            args=args,
            train_dataset=data.dataset,
            eval_dataset=eval_rows,
            collator=make_collator(model, options, is_flat=is_flat),
            is_packed=is_flat,
            callbacks=callbacks,
            plan=plan,
            compute_metrics=compute_metrics,
            chooses_checkpointing=(
                "gradient_checkpointing" not in settings.trainer
                and model.adapter.use_gradient_checkpointing == "auto"
            ),
        )
        identity = identify_run(model, data.dataset, data.formatter, args)
        resumption = choose_checkpoint(
            found, resume_from_checkpoint, identity, new_id, takes_changes=resume_with_changes
        )
        _refuse_what_is_over(resumption, args.max_steps)
        asked = {
            **fields, "truncation": truncation, "plan": plan, "callbacks": callbacks or None,
            "sample_prompts": list(prompts) or None, "sample_steps": sample_steps,
        }  # fmt: skip
        recipe = describe_recipe(model, data, eval_dataset, asked)
        return run_training(
            model, Run(
                job, data, options, optimizer, device, folder, identity, resumption, recipe,
                prompts, sample_steps, fields, bool(resume_from_checkpoint),
            ),
        )  # fmt: skip


def _refuse_what_is_over(resumption: Resumption, max_steps: int) -> None:
    resumed = resumption.checkpoint
    if resumed is not None and 0 < max_steps <= resumed.step:
        raise ConfigError(
            f"{resumed.path} has done {resumed.step} steps already, and ",
            Setting("max_steps", max_steps, "train_sft"),
            " asks for no more. Raise it to go on.",
        )


def check_training(
    *,
    output_dir: str | os.PathLike[str] = "outputs",
    has_eval: bool = False,
    truncation: str = "end",
    plan: Any = None,
    callbacks: Any = None,
    compute_metrics: Any = None,
    sample_prompts: Any = None,
    sample_steps: Any = None,
    resume_from_checkpoint: bool | str | os.PathLike[str] | None = None,
    resume_with_changes: bool = False,
    **sft_config: Any,
) -> None:
    """Refuse settings that :func:`train_sft` would refuse whatever the model, before loading one.

    Args:
        output_dir: As for ``train_sft``.
        has_eval: Whether there are rows to evaluate on.
        truncation: As for ``train_sft``.
        plan: Left to the engine, which comes with the model.
        callbacks: As for ``train_sft``.
        compute_metrics: Left to ``train_sft``.
        sample_prompts: As for ``train_sft``.
        sample_steps: As for ``train_sft``.
        resume_from_checkpoint: As for ``train_sft``.
        resume_with_changes: As for ``train_sft``.
        **sft_config: Any field of TRL's ``SFTConfig``, by its own name.

    Raises:
        ConfigError: At the first setting that cannot work.
    """
    _check_callbacks(callbacks)
    check_prompts(sample_prompts, sample_steps)
    check_values(sft_config, has_eval=has_eval)
    read_settings(sft_config, truncation, longest=2)
    folder = check_output_folder(output_dir)
    _check_insisting(resume_with_changes, resume_from_checkpoint)
    check_unused(folder)
    find_checkpoints(resume_from_checkpoint, folder, None)


def _check_insisting(takes_changes: object, resume: object) -> None:
    if not isinstance(takes_changes, bool):
        raise invalid_value("resume_with_changes", "must be True or False", takes_changes)
    if takes_changes and not resume:
        raise ConfigError(
            Setting("resume_with_changes", True),
            " is about a checkpoint: give ",
            Setting("resume_from_checkpoint"),
            " as well.",
            parameter="resume_with_changes",
            value=True,
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, AdaptedModel):
        hint = (
            "attach an adapter first: model = attach_lora(model)"
            if isinstance(model, LoadedModel)
            else "it takes what attach_lora returned, the handle, not what it unpacks as"
        )
        raise ConfigError(f"train_sft got {type(model).__name__}; {hint}.")
    if model.trainable_parameters == 0:
        raise ConfigError(
            "This adapter was loaded for inference only; load it with ",
            Setting("is_trainable", True, "load_quantized"),
            ".",
        )


def _check_columns(columns: Any) -> None:
    if columns is not None and not (
        isinstance(columns, Mapping)
        and all(isinstance(word, str) for pair in columns.items() for word in pair)
    ):
        raise invalid_value(
            "columns", "must be a mapping of roles to the names of columns", columns, "formatter"
        )


def _check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    from transformers import TrainerCallback

    given = () if callbacks is None else callbacks
    if not isinstance(given, Sequence) or not all(
        isinstance(one, TrainerCallback)
        or (isinstance(one, type) and issubclass(one, TrainerCallback))
        for one in given
    ):
        raise ConfigError(
            f"callbacks must be a list of transformers.TrainerCallback objects or classes, "
            f"got {callbacks!r}."
        )
    return tuple(given)


def _prepare_eval(model: AdaptedModel, rows: Any, data: TrainingData, options: DataOptions) -> Any:
    """Evaluation rows are formatted like the training rows and never packed."""
    if rows is None:
        return None
    if isinstance(rows, Mapping):
        if not rows:
            raise DataError(
                Setting("eval_dataset"), " is an empty dictionary. Leave it out, or give it rows."
            )
        return {name: _prepare_eval(model, part, data, options) for name, part in rows.items()}
    try:
        return prepare_examples(model, rows, data.formatter, options).dataset
    except DataError as error:
        raise error.after(Setting("eval_dataset"), ": ") from error
