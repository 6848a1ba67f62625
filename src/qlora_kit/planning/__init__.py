"""Knowing before the start: memory by part, steps, time and disk, from configuration and data.

No weight is read and nothing is trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.config import SCRIPT_TRAINING_DEFAULTS, AdapterConfig
from qlora_kit.engines.native.fast.plan_options import FastPlan, parse_plan
from qlora_kit.errors import invalid_value
from qlora_kit.forecast import (
    MOST_MEASURED,
    Card,
    MemoryForecast,
    find_card,
    find_efficiency,
    find_step_seconds,
    forecast_memory,
    read_shape,
)
from qlora_kit.forecast.shapes import ModelShape
from qlora_kit.forecast.steps import RowTokens, StepShape
from qlora_kit.pipeline import CheckedPipeline, Pipeline, check_pipeline
from qlora_kit.planning.checkpoint import open_configuration
from qlora_kit.planning.disk import forecast_disk
from qlora_kit.planning.machine import measure_machine
from qlora_kit.planning.result import TrainingForecast
from qlora_kit.planning.tokens import count_tokens
from qlora_kit.training.arguments import choose_optimizer
from qlora_kit.values import is_whole_number

if TYPE_CHECKING:
    from qlora_kit.planning.checkpoint import Configuration

__all__ = ["TrainingForecast", "plan_training"]

#: Longer rows, and more cards in one machine, than there are.
_MOST_TOKENS: Final = 2**31
_MOST_RANKS: Final = 1024

#: Cards before Ampere, which have no bfloat16.
_FLOAT16: Final = ("T4", "V100", "GTX", "RTX 20")


def plan_training(
    pipeline: Pipeline | str | os.PathLike[str] | Mapping[str, Any],
    *,
    card: str | None = None,
    row_tokens: int | None = None,
    ranks: int = 1,
) -> TrainingForecast:
    """Foretell what a training takes: memory by part, steps, time, disk. No weight is read.

    Args:
        pipeline: What is to be done: a :class:`~qlora_kit.Pipeline`, a recipe's file, or its
            content. Of the model its ``config.json`` is enough, and its tokenizer where there is
            data. A pipeline whose ``data`` is ``None`` is planned for rows of ``row_tokens``.
        card: A card by name or memory, ``"RTX 3060 12GB"`` or ``"24GB"``; this machine by default.
        row_tokens: Tokens of a row where there is no data; the longest that fit by default.
        ranks: How many such cards of one machine train together.

    Returns:
        The forecast. ``print`` shows it; ``fits`` says whether it fits, and ``remedies`` what
        would make it fit.

    Raises:
        ConfigError: When a setting cannot work or no card is called that.
        QloraKitError: What checking the pipeline raises.
    """
    if not isinstance(pipeline, Pipeline):
        from qlora_kit.recipes import make_pipeline, read_recipe

        pipeline = make_pipeline(
            read_recipe(pipeline) if isinstance(pipeline, str | os.PathLike) else pipeline
        )
    if row_tokens is not None and not (
        is_whole_number(row_tokens, at_least=1) and row_tokens <= _MOST_TOKENS
    ):
        raise invalid_value(
            "row_tokens", f"must be a whole number from 1 to {_MOST_TOKENS:,}", row_tokens,
            "plan_training",
        )  # fmt: skip
    if not (is_whole_number(ranks, at_least=1) and ranks <= _MOST_RANKS):
        raise invalid_value(
            "ranks", f"must be a number of cards of one machine, from 1 to {_MOST_RANKS}", ranks,
            "plan_training",
        )  # fmt: skip
    checked = _check(pipeline)
    device = measure_machine() if card is None else find_card(card)
    opened = open_configuration(pipeline)
    shape = read_shape(opened.model_config)
    tokens = count_tokens(checked, opened.folder, row_tokens)
    asked = _Asked(pipeline, opened, device, tokens, ranks)
    return asked.forecast(shape)


def _check(pipeline: Pipeline) -> CheckedPipeline:
    """All that needs no model; where there is no data, all but the data."""
    # What lies in the way of exports is no matter of a plan.
    pipeline = replace(pipeline, overwrite=True)
    if pipeline.data is not None:
        return check_pipeline(pipeline)
    stand_in = replace(
        pipeline, data=[{"text": "a row"}], eval_data=None, eval_fraction=None, formatting={}
    )
    return replace(check_pipeline(stand_in), asked=pipeline)


class _Asked:
    """A training on a device, which can be asked again with other settings."""

    def __init__(
        self, pipeline: Pipeline, opened: Configuration, device: Card, tokens: RowTokens, ranks: int
    ) -> None:
        self._ranks = ranks
        self._pipeline, self._opened, self._device, self._tokens = pipeline, opened, device, tokens
        names = {field.name for field in fields(AdapterConfig)}
        given = {name: value for name, value in pipeline.adapter.items() if name in names}
        self._adapter = AdapterConfig(**given)
        self._training = {**SCRIPT_TRAINING_DEFAULTS, **pipeline.training}
        self._plan: FastPlan = parse_plan(self._training.get("plan"))
        self._item_bytes = 4 if self._find_dtype() == "float32" else 2

    def _find_dtype(self) -> str:
        asked = self._pipeline.loading.get("dtype")
        if asked is not None:
            return str(asked).removeprefix("torch.")
        if self._device.source == "measured":
            from qlora_kit.device import choose_compute_dtype, get_device

            return choose_compute_dtype(None, get_device())
        return "float16" if self._device.name.startswith(_FLOAT16) else "bfloat16"

    def forecast(self, shape: ModelShape) -> TrainingForecast:
        """The forecast, and what would make it fit where it does not."""
        made = self._forecast(shape)
        if made.memory.fits:
            return made
        return replace(made, remedies=tuple(self._find_remedies(shape)))

    def _forecast(self, shape: ModelShape) -> TrainingForecast:
        import torch

        kind, training = self._device.kind, self._training
        optimizer = choose_optimizer(training.get("optim"), torch.device(kind)).name
        if kind == "cuda" and self._device.source == "quoted":
            # The card is elsewhere, and bitsandbytes with it.
            optimizer = str(training.get("optim") or "adamw_8bit")
        quantization = self._opened.quantization
        step = self._tokens.of_steps(
            int(training["per_device_train_batch_size"]),
            int(training["gradient_accumulation_steps"]),
        )

        def measure(shards: int) -> MemoryForecast:
            return forecast_memory(
                shape,
                self._adapter,
                step,
                quantization=quantization,
                item_bytes=self._item_bytes,
                optimizer=optimizer,
                device_type=kind,
                available=self._device.memory_bytes,
                asked=self._plan,
                recomputes=self._recomputes(),
                shards=shards,
            )

        whole = measure(1)
        sharded = measure(self._ranks) if self._can_shard(shape) else None
        is_sharded = sharded is not None and (
            self._plan.shard is True or (not whole.fits and sharded.fits)
        )
        memory = sharded if is_sharded and sharded is not None else whole
        steps = self._count_steps()
        seconds = self._estimate_seconds(shape, step, steps, memory.plan)
        if seconds is not None and self._ranks > 1:
            seconds /= find_efficiency(step.usual)
        return TrainingForecast(
            model=str(self._pipeline.model),
            device=self._device,
            quantization=quantization,
            parameters=shape.parameters,
            trainable_parameters=shape.count_adapter(self._adapter),
            memory=memory,
            rows=self._tokens.rows,
            row_tokens=step.longest,
            step_tokens=step.usual,
            steps=steps,
            seconds=seconds,
            disk=forecast_disk(self._pipeline, shape, self._adapter, steps, training),
            notes=self._find_notes(shape),
            ranks=self._ranks,
            other_memory=None if sharded is None else whole if is_sharded else sharded,
            is_sharded=is_sharded,
        )

    def _can_shard(self, shape: ModelShape) -> bool:
        """Whether ranks may spread the base over themselves, as far as can be told from here."""
        plan = self._plan
        return (
            self._ranks > 1
            and shape.obstacle is None
            and plan.enabled is not False
            and plan.shard is not False
            and plan.weights != "cache"
            and plan.cuda_graphs is not True
            and self._opened.quantization != "int8"
        )

    def _recomputes(self) -> bool | None:
        asked = self._training.get("gradient_checkpointing")
        if asked is None:
            chosen = self._adapter.use_gradient_checkpointing
            return None if chosen == "auto" else bool(chosen)
        return bool(asked)

    def _count_steps(self) -> int:
        training = self._training
        if "num_train_epochs" in self._pipeline.training and (
            "max_steps" not in self._pipeline.training
        ):
            rows = int(training["per_device_train_batch_size"]) * int(
                training["gradient_accumulation_steps"]
            )
            per_epoch = max(1, -(-self._tokens.rows // (rows * self._ranks)))
            return max(1, int(per_epoch * float(training["num_train_epochs"])))
        return int(training["max_steps"])

    def _estimate_seconds(
        self, shape: ModelShape, step: StepShape, steps: int, plan: Any
    ) -> float | None:
        """Forward and backward of frozen weights, twice the adapters', and what is recomputed."""
        speed = self._device.teraflops
        if speed is None or plan is None:
            return None
        multiplied = shape.dequantized + shape.vocabulary * shape.hidden
        recomputed = 2 * shape.dequantized * plan.checkpointed_layers / max(1, plan.layers)
        work = 4 * multiplied + 6 * shape.count_adapter(self._adapter) + recomputed
        # Every pair of a token and one before it, forward and backward.
        work += 6 * shape.layers * shape.heads * shape.head_dim * self._tokens.average_attended
        parts = -(-step.usual // max(1, plan.micro_batch_tokens))
        return steps * find_step_seconds(self._device.kind, speed, step.usual * work, parts)

    def _find_notes(self, shape: ModelShape) -> tuple[str, ...]:
        notes = []
        if shape.obstacle is not None:
            notes.append(
                f"TRL and peft compute the steps ({shape.obstacle}): memory is estimated coarsely, "
                "time not at all."
            )
        if self._pipeline.data is None:
            notes.append(f"No data was given: rows of {self._tokens.longest:,} tokens are assumed.")
        if self._ranks > MOST_MEASURED:
            notes.append(
                f"Several cards were measured up to {MOST_MEASURED}; beyond, the time is a guess."
            )
        return tuple(notes)

    # -- what would make it fit ------------------------------------------------------------------

    def _find_remedies(self, shape: ModelShape) -> list[str]:
        """Changes that would make it fit, each alone, and the least that has to change together."""
        found = []
        for words, changed in self._list_changes():
            memory = changed._forecast(shape).memory
            if memory.fits:
                found.append(f"{words} ({memory.total / 1024**3:.1f} GiB)")
        if not found:
            together = self._with_all(self._list_changes())
            if together is not None and together[1]._forecast(shape).memory.fits:
                found.append(f"{together[0]}, together")
        return found or ["nothing here: a smaller model, or more memory"]

    def _list_changes(self) -> list[tuple[str, _Asked]]:
        changes: list[tuple[str, _Asked]] = []
        if self._opened.quantization is None:
            opened = replace(self._opened, quantization="nf4")
            changes.append(("load_in_4bit=True", self._changed(_opened=opened)))
        if self._plan.checkpointing in ("none", "selective") or self._recomputes() is False:
            plan = replace(self._plan, checkpointing="full", checkpointed_layers=None)
            changes.append(("gradient_checkpointing=True", self._changed(_plan=plan)))
        longest = self._tokens.longest
        shorter = [n for n in (8192, 4096, 2048, 1024, 512, 256) if n < longest]
        changes += [
            (f"max_seq_length={n}", self._changed(_tokens=self._tokens.cut(n))) for n in shorter
        ]
        if self._adapter.r > 8:
            adapter = replace(self._adapter, r=8)
            changes.append(("r=8", self._changed(_adapter=adapter)))
        return changes

    def _with_all(self, changes: list[tuple[str, _Asked]]) -> tuple[str, _Asked] | None:
        if len(changes) < 2:
            return None
        changed = self._changed()
        words: list[str] = []
        for text, other in changes:
            for name in ("_opened", "_plan", "_tokens", "_adapter"):
                if getattr(other, name) is not getattr(self, name):
                    setattr(changed, name, getattr(other, name))
            words = [one for one in words if one.split("=")[0] != text.split("=")[0]] + [text]
        return ", ".join(words), changed

    def _changed(self, **changes: Any) -> _Asked:
        other = object.__new__(_Asked)
        other.__dict__.update({**self.__dict__, **changes})
        return other
