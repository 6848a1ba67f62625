"""Running the micro-batches of a step, plainly or as replayed CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.boundaries import is_out_of_memory
from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.graphs import GraphPool
from qlora_kit.engines.native.fast.layout import Example, MicroBatch, group_examples, lay_out
from qlora_kit.engines.native.fast.plan import ResolvedPlan, round_for_graph, shrink_plan
from qlora_kit.values import IGNORED_LABEL

__all__ = ["StepRunner"]

logger = logging.getLogger(__name__)

# Matrix products on tensor cores want sizes divisible by 8; more makes kernels and allocations
# repeat from step to step.
_EAGER_MULTIPLE = 64


class StepRunner:
    """Forward and backward of whole effective batches."""

    def __init__(self, fused_model: FusedModel) -> None:
        self.fused_model = fused_model
        self.zero = torch.zeros((), dtype=torch.float32, device=fused_model.device)
        self._graphs: GraphPool | None = None
        self._longest = 512

    def supports_graphs(self) -> bool:
        """Whether a micro-batch can be captured: everything fused, on CUDA, one attention call."""
        fused_model = self.fused_model
        return (
            fused_model.device.type == "cuda"
            and fused_model.is_capturable
            and fused_model.attention == "varlen"
            and fused_model.dtype != torch.float16
        )

    def run_step(
        self, examples: Sequence[Example], trained: int, scaler: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over ``trained`` tokens, left in peft's parameters.

        Args:
            examples: The effective batch.
            trained: Its trained tokens; of several ranks, this one's (at least 1).
            scaler: fp16's gradient scaler, if there is one.

        Returns:
            The mean loss over all ranks, and ``[hits, entropy]`` summed over ``trained`` tokens;
            both stay on the device.
        """
        total, stats = self._in_what_fits(
            examples, lambda: self._run_batches(examples, trained, scaler)
        )
        self.all_tokens: Tensor | int = sum(len(example.input_ids) for example in examples)
        rank_sum = self.fused_model.rank_sum
        if rank_sum is not None:
            own = sum(int((one.targets != IGNORED_LABEL).sum()) for one in examples)
            # Over all ranks from here on, the means of what were sums among them.
            total, stats, self.all_tokens = rank_sum.add_up(own, self.all_tokens, total, stats)
            stats *= trained
        self.fused_model.end_step()
        return total, stats

    def evaluate(self, examples: Sequence[Example], trained: int) -> tuple[Tensor, Tensor]:
        """The mean loss and ``[hits, entropy]`` without gradients."""
        return self._in_what_fits(examples, lambda: self._evaluate(examples, trained))

    def _in_what_fits(
        self, examples: Sequence[Example], compute: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Compute with the plan; where memory runs out, anew and with less from then on.

        Nothing of a step is the optimizer's before all of it is there, so that the effective batch
        and its gradients stay the same.
        """
        asked, gathers = self.fused_model.plan, self.fused_model.gathers
        while True:
            smaller = None
            try:
                found = compute()
            except (RuntimeError, MemoryError) as error:
                smaller = self._find_smaller(examples) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            # Ranks that bring each other their layers compute a step together or not at all.
            if gathers is not None and gathers.any_failed(smaller is not None):
                smaller = smaller or self.fused_model.plan
            if smaller is None:
                break
            # Here, where the error no longer holds what the step had allocated.
            self._graphs = None
            self.fused_model.apply_smaller(smaller)
            if self.fused_model.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.fused_model.plan is not asked:
            logger.warning(
                "Memory ran out in a step. It was computed anew, and the rest of the run goes on, "
                "with %s. The effective batch is the same.", self.fused_model.plan,
            )  # fmt: skip
        return found

    def _find_smaller(self, examples: Sequence[Example]) -> ResolvedPlan | None:
        fused_model = self.fused_model
        groups = group_examples(examples, fused_model.plan.micro_batch_tokens)
        sizes = [sum(len(example.input_ids) for example in group) for group in groups]
        return shrink_plan(
            fused_model.plan,
            fused_model.memory_model(),
            largest=max(sizes, default=1),
            longest=max((len(example.input_ids) for example in examples), default=1),
        )

    def _run_batches(
        self, examples: Sequence[Example], trained: int, scaler: Any
    ) -> tuple[Tensor, Tensor]:
        fused_model, plan = self.fused_model, self.fused_model.plan
        if plan.uses_cuda_graphs and self._graphs is None:
            self._graphs = GraphPool(fused_model)
        share = 1.0 / trained
        fused_model.begin_step(
            share if scaler is None else scaler.scale(self.zero + share),
            trained=trained,
            tokens=sum(len(example.input_ids) for example in examples),
        )
        total = self.zero.clone()
        stats = torch.zeros(2, dtype=torch.float32, device=fused_model.device)
        for batch in self._begin(examples, with_backward=True):
            if self._graphs is not None and batch.tokens <= plan.graph_tokens:
                loss, part = self._graphs.run(batch, trained)
            else:
                loss, part = self._run_plainly(batch.to(fused_model.device), trained, scaler)
            total += loss
            stats += part
        return total, stats

    def _evaluate(self, examples: Sequence[Example], trained: int) -> tuple[Tensor, Tensor]:
        fused_model = self.fused_model
        tokens = sum(len(example.input_ids) for example in examples)
        fused_model.begin_step(trained=trained, tokens=tokens)
        total = self.zero.clone()
        stats = torch.zeros(2, dtype=torch.float32, device=fused_model.device)
        for batch in self._begin(examples, with_backward=False):
            with torch.no_grad():
                loss, part = fused_model.loss(batch.to(fused_model.device))
            total += loss / trained
            stats += part
        return total, stats

    def _begin(self, examples: Sequence[Example], *, with_backward: bool) -> list[MicroBatch]:
        """The micro-batches that have anything to learn from."""
        batches = [batch for batch in self._lay_out(examples) if batch.trained_tokens]
        if self.fused_model.gathers is not None:
            self.fused_model.gathers.begin(len(batches), with_backward=with_backward)
        return batches

    def _run_plainly(self, batch: MicroBatch, trained: int, scaler: Any) -> tuple[Tensor, Tensor]:
        loss, stats = self.fused_model.loss(batch)
        loss = loss / trained
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.fused_model.end_micro_batch()
        return loss.detach(), stats

    def _lay_out(self, examples: Sequence[Example]) -> list[MicroBatch]:
        most = self.fused_model.plan.micro_batch_tokens
        if self.fused_model.device.type == "cpu":
            return lay_out(examples, most)
        if self.fused_model.plan.uses_cuda_graphs:
            return lay_out(
                examples,
                most,
                round_tokens=round_for_graph,
                round_trained=_round_trained_for_graph,
                round_count=_round_count_for_graph,
                round_longest=self._declare_longest,
            )
        return lay_out(examples, most, round_tokens=_round_up, round_longest=_round_longest)

    def _declare_longest(self, size: int) -> int:
        """A power of two that only grows, so that graphs differ in one size less."""
        self._longest = max(self._longest, 1 << (size - 1).bit_length())
        return self._longest


def _round_up(size: int) -> int:
    return -(-size // _EAGER_MULTIPLE) * _EAGER_MULTIPLE


def _round_longest(size: int) -> int:
    # Attention launches a block for every 128 tokens up to this length, for every example.
    return -(-size // 128) * 128


def _round_trained_for_graph(size: int, tokens: int) -> int:
    """To quarters of the micro-batch, whose share of trained tokens hardly changes."""
    quarter = -(-tokens // 4)
    return min(-(-size // quarter) * quarter, tokens)


def _round_count_for_graph(size: int) -> int:
    return max(17, (1 << (size - 2).bit_length()) + 1)
