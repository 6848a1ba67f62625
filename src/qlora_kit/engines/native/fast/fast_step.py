"""The fast path inside TRL's trainer: rows in, one forward and backward per micro-batch out.

Everything else stays the trainer's: sampling, optimizer, schedule, clipping, callbacks,
logging, evaluation, checkpoints and resuming. The data loader still yields one batch per
accumulation step, but as raw rows; when a step's batches are complete they are laid out
anew, the last batch carries all of the work and the others none. The loss is the sum over
trained tokens divided by their number in the whole effective batch, as TRL's is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from qlora_kit import ranks
from qlora_kit.device import measure_free_bytes, reserve_memory
from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import Example, keep_rows, split_rows
from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.shard_choice import check_shards, resolve_with_shards
from qlora_kit.engines.native.fast.step_memory import count_state_bytes
from qlora_kit.engines.native.fast.step_runner import StepRunner
from qlora_kit.engines.native.layers.compilation import find_too_short
from qlora_kit.engines.native.sharding.shards import make_whole
from qlora_kit.engines.trainer_mixins import TrlSteps
from qlora_kit.values import IGNORED_LABEL

if TYPE_CHECKING:
    from qlora_kit.engines.native.fast.plan import ResolvedPlan

__all__ = ["FastStep"]

logger = logging.getLogger(__name__)

_EXAMPLES = "examples"
_MASK_TOKENS = 4096


class FastStep(TrlSteps):
    """Mixin for ``SFTTrainer``; does nothing until :meth:`start_fast` is called."""

    _runner: StepRunner | None = None
    _asked: FastPlan
    train_dataset: Any
    _filters_logged_losses: bool = True

    def start_fast(self, model: Any, asked: FastPlan) -> None:
        """Compute training steps of a ``PeftModel`` here from now on."""
        fused_model = FusedModel(model, asked)
        check_shards(fused_model, asked)
        self._runner = StepRunner(fused_model)
        # Arrays out of the dataset's memory: as lists, numbers would be turned over one by one
        # while the GPU waits.
        if hasattr(self.train_dataset, "with_format"):
            self.train_dataset = self.train_dataset.with_format("numpy")
        if ranks.find_place().world > 1:
            accelerator = self.accelerator  # type: ignore[attr-defined]
            accelerator.prepare_model = functools.partial(_prepare, accelerator.prepare_model)
        self._asked = asked
        self._fast_metrics: dict[str, list[Any]] = {"train": [], "eval": []}
        self._parameter_count: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; whoever reads the model afterwards finds the whole of it."""
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        if self._runner is not None and self._runner.fused_model.node is not None:
            make_whole(self.model)  # type: ignore[attr-defined]
        return output

    def stop_fast(self) -> None:
        """Free the fast path's buffers."""
        self._runner = None

    @property
    def uses_fast_step(self) -> bool:
        """Whether steps are computed here."""
        return self._runner is not None

    @property
    def fast_plan(self) -> ResolvedPlan | None:
        """What the fast path decided, once the first step began; ``None`` when it is not used."""
        runner = self._runner
        return (
            runner.fused_model.plan
            if runner is not None and runner.fused_model.is_planned
            else None
        )

    def get_train_dataloader(self) -> Any:
        """Batches of raw rows."""
        with self._keeping_rows(self._runner is not None):
            return super().get_train_dataloader()  # type: ignore[misc]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of raw rows, unless metrics need the model's logits."""
        with self._keeping_rows(self._evaluates_fast):
            return super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take one optimizer step's rows; the last sample holds all of them, laid out anew."""
        if self._runner is None:
            samples: tuple[list[Any], Any] = super().get_batch_samples(  # type: ignore[misc]
                epoch_iterator, num_batches, device
            )
            return samples
        rows: list[Any] = []
        count = 0
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            rows.extend(batch.rows)
            count += 1
        if count == 0:
            return [], None
        examples = split_rows(rows)
        if not self._runner.fused_model.is_planned:
            self._decide(examples)
        empty = torch.empty(0, dtype=torch.long)
        samples_out: list[dict[str, Any]] = [
            {"input_ids": empty, "labels": empty} for _ in range(count - 1)
        ]
        samples_out.append(_as_sample(examples))
        trained = sum(int((example.targets != IGNORED_LABEL).sum()) for example in examples)
        return samples_out, max(trained, 1)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of a whole effective batch; a sample without examples is free."""
        runner = self._runner
        if runner is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if _EXAMPLES not in inputs:
            return runner.zero
        if not model.training:
            model.train()
        if hasattr(self.optimizer, "train"):  # type: ignore[attr-defined]
            self.optimizer.train()  # type: ignore[attr-defined]
        examples: list[Example] = inputs[_EXAMPLES]
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        loss, stats = runner.run_step(examples, num_items_in_batch, scaler)
        self._note("train", examples, stats, num_items_in_batch)
        every = self.args.torch_empty_cache_steps  # type: ignore[attr-defined]
        if every is not None and self.state.global_step % every == 0:  # type: ignore[attr-defined]
            clear_device_cache()
        if not self._filters_logged_losses:
            return loss
        # What was computed, for the record; what is logged is filtered below.
        self._unfiltered_loss = loss
        # The trainer's own filter for the logged loss would wait for the device.
        steps = 1 + self.state.global_step - self._globalstep_last_logged  # type: ignore[attr-defined]
        return torch.where(torch.isfinite(loss), loss, self._tr_loss / steps)  # type: ignore[attr-defined]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Mean loss per trained token of an evaluation batch."""
        if self._runner is None or not hasattr(inputs, "rows"):
            return super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, ignore_keys
            )
        examples = split_rows(inputs.rows)
        if not self._runner.fused_model.is_planned:
            self._decide(examples)
        # Even without rows, layers are brought to ranks that have some.
        if not examples and self._runner.fused_model.gathers is None:
            return self._runner.zero, None, None
        trained = max(1, sum(int((example.targets != IGNORED_LABEL).sum()) for example in examples))
        loss, stats = self._runner.evaluate(examples, trained)
        self._trained_in_batch = trained
        self._note("eval", examples, stats, trained)
        return loss, None, None

    def floating_point_ops(self, inputs: Any) -> int:
        """The trainer's estimate, without walking through every parameter at every step."""
        if self._runner is None:
            return int(super().floating_point_ops(inputs))  # type: ignore[misc]
        if self._parameter_count is None:
            model = self.model  # type: ignore[attr-defined]
            self._parameter_count = int(model.num_parameters(exclude_embeddings=True))
        return 6 * int(inputs["input_ids"].numel()) * self._parameter_count

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the metrics gathered on the device since the last time."""
        if self._runner is not None:
            mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
            noted, self._fast_metrics[mode] = self._fast_metrics[mode], []
            metrics = self._metrics[mode]  # type: ignore[attr-defined]
            for stats, trained in noted:
                hits, entropy = stats.tolist()
                metrics["entropy"].append(entropy / trained)
                metrics["mean_token_accuracy"].append(hits / trained)
            metrics["num_tokens"] = [int(self._total_train_tokens)]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _note(self, mode: str, examples: list[Example], stats: Any, trained: int) -> None:
        if mode == "train":
            assert self._runner is not None
            tokens = self._runner.all_tokens
            self._total_train_tokens = getattr(self, "_total_train_tokens", 0) + tokens
        self._fast_metrics[mode].append((stats, trained))

    def _decide(self, examples: list[Example]) -> None:
        assert self._runner is not None
        fused_model = self._runner.fused_model
        args, dataset = self.args, self.train_dataset  # type: ignore[attr-defined]
        lengths = [len(example.input_ids) for example in examples]
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        longest, step_tokens, usual_tokens = _measure_rows(dataset, rows, lengths)

        fused_model.state_bytes = count_state_bytes(args.optim)

        def resolve() -> ResolvedPlan:
            assert self._runner is not None
            node, memory = fused_model.node, fused_model.memory_model()
            free = measure_free_bytes(fused_model.device) - fused_model.buffer_bytes()
            return resolve_plan(
                self._asked,
                memory,
                device_type=fused_model.device.type,
                # Predictions count what is there for the step already.
                free_bytes=free + memory.standing,
                step_tokens=step_tokens,
                usual_tokens=usual_tokens,
                # A mask over all pairs of tokens grows with the square.
                most_tokens=_MASK_TOKENS if fused_model.attention == "mask" else None,
                longest=longest,
                is_quantized=fused_model.is_quantized,
                supports_graphs=self._runner.supports_graphs(),
                shards=1 if node is None else len(node.members),
            )

        plan = resolve_with_shards(fused_model, self._asked, resolve)
        if self._asked.compile == "auto" and fused_model.is_compiled:
            steps = max(self.state.max_steps, args.max_steps)  # type: ignore[attr-defined]
            too_short = find_too_short(
                fused_model.device, steps, usual_tokens, fused_model.count_weights()
            )
            if too_short is not None:
                fused_model.run_plainly()
                logger.info("Running decoder layers without torch.compile: %s.", too_short)
        plan = dataclasses.replace(plan, is_compiled=fused_model.is_compiled)
        fused_model.apply(plan)
        reserve_memory(fused_model.device, plan.step_bytes)
        logger.info("Training step: %s.", plan)
        if plan.predicted_bytes > plan.usable_bytes:
            logger.warning(
                "A training step may need more memory than is free (%s). Shorten max_length, or "
                "see the plan's options.", plan,
            )  # fmt: skip

    @property
    def _evaluates_fast(self) -> bool:
        return self._runner is not None and self.compute_metrics is None  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _keeping_rows(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        collator = self.data_collator
        self.data_collator: Any = keep_rows
        try:
            yield
        finally:
            self.data_collator = collator


def _prepare(prepare_model: Callable[..., Any], model: Any, **_: Any) -> Any:
    """The accelerator's preparation of a model, which stays where it is and without a wrapper."""
    # DDP would broadcast the frozen base, and wait for gradients that autograd never makes. Moved
    # from "cpu" to "cpu:0", weights that other ranks hold would be filled up.
    return prepare_model(model, device_placement=False, evaluation_mode=True)


def _as_sample(examples: list[Example]) -> dict[str, Any]:
    """What other code may look at (token ids, and labels in place), and the examples."""
    if not examples:
        # A rank without rows still takes part in the step's sum.
        empty = torch.empty(0, dtype=torch.long)
        return {"input_ids": empty, "labels": empty, _EXAMPLES: examples}
    input_ids = np.concatenate([example.input_ids for example in examples])
    # In a row, the label of a token lies where the token lies. An example's last target is -100,
    # which becomes the label of the next one's first token.
    labels = np.concatenate([[IGNORED_LABEL], *(example.targets for example in examples)])[:-1]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        _EXAMPLES: examples,
    }


def _measure_rows(dataset: Any, rows: int, lengths: list[int]) -> tuple[int, int, int]:
    """Tokens of the longest example, and of the largest and the average effective batch."""
    longest, step_tokens = max(lengths, default=1), max(sum(lengths), 1)
    if not hasattr(dataset, "column_names") or "input_ids" not in (dataset.column_names or ()):
        return longest, step_tokens, step_tokens
    # As lists: a whole column of arrays takes five times as long.
    dataset = dataset.with_format(None)
    sizes = sorted((len(ids) for ids in dataset["input_ids"]), reverse=True)
    if "seq_lengths" in dataset.column_names:
        longest = max(max(parts, default=0) for parts in dataset["seq_lengths"])
    else:
        longest = sizes[0]
    usual = sum(sizes) * min(rows, len(sizes)) // max(len(sizes), 1)
    return max(longest, *lengths), max(step_tokens, sum(sizes[:rows])), usual
