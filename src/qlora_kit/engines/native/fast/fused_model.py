"""The forward and backward pass of a micro-batch over a peft model's own tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kit import ranks
from qlora_kit.engines.native.fast.layout import MicroBatch
from qlora_kit.engines.native.fast.plan import ResolvedPlan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.rank_sum import RankSum
from qlora_kit.engines.native.fast.read_model import ReadModel
from qlora_kit.engines.native.fast.step_memory import MemoryModel
from qlora_kit.engines.native.layers.attention import AttentionKind
from qlora_kit.engines.native.layers.attention_choice import resolve_attention
from qlora_kit.engines.native.layers.compilation import Compiled
from qlora_kit.engines.native.layers.expert_layers import (
    ExpertBlock,
    RouterBalance,
    balance_experts,
    read_balance,
)
from qlora_kit.engines.native.layers.family_reader import GROUPS, read_norms
from qlora_kit.engines.native.layers.layer import (
    LayerShape,
    LayerTensors,
    Modules,
    Projections,
    add_fed,
    attention_block,
    decoder_layer,
)
from qlora_kit.engines.native.layers.loss import SoftmaxStep, plain_softmax_step, softmax_step
from qlora_kit.engines.native.layers.peft_layers import GroupReader
from qlora_kit.engines.native.layers.positions import Positions
from qlora_kit.engines.native.layers.projection import (
    dequantize,
    fill_joined,
    join,
    rounds_before_adding,
)
from qlora_kit.engines.native.sharding.layer_gathers import LayerGathers

__all__ = ["FusedModel"]


class FusedModel(ReadModel):
    """Runs micro-batches through a model with LoRA adapters.

    Args:
        model: A ``PeftModel`` that :func:`support.find_obstacle` has nothing against. It is read,
            never changed.
        asked: What the user pinned.
    """

    def __init__(self, model: Any, asked: FastPlan) -> None:
        device = model.get_base_model().get_input_embeddings().weight.device
        self._layer_call = Compiled(
            decoder_layer, asked.compile, device, "decoder layers", otherwise=_plain_layer
        )
        self._attention_call = Compiled(attention_block, asked.compile, device, "attention")
        super().__init__(model, self._choose_gated)
        self.attention: AttentionKind = resolve_attention(
            asked.attention, self.device, self.dtype, self.shape
        )
        self._positions = Positions(self._decoder, self._config, self._family)
        self._balance = read_balance(self._config) if self.has_experts else 0.0
        self.rank_sum = (
            None
            if ranks.join().world == 1
            else RankSum(self.gathered, self._left_to_autograd, self.device)
        )
        self._layers: list[LayerTensors] = []
        # Cached weights that hold their adapters too, with those.
        self._joined: list[tuple[Tensor, Tensor, Tensor]] = []
        self._plan: ResolvedPlan | None = None
        self.gathers: LayerGathers | None = None
        #: Bytes of the optimizer's states for each number that trains.
        self.state_bytes = 8
        self._softmax_call = self._choose_softmax(asked)

    @property
    def plan(self) -> ResolvedPlan:
        """What was decided; set by :meth:`apply`."""
        assert self._plan is not None
        return self._plan

    @property
    def is_planned(self) -> bool:
        """Whether :meth:`apply` was called."""
        return self._plan is not None

    def apply(self, plan: ResolvedPlan) -> None:
        """Set up what a plan asks for."""
        self._plan = plan
        self._joined = []
        self._layers = []
        for layer, readers in zip(self._decoder.layers, self._readers, strict=True):
            qkv, out, gate_up, down = (
                self._group(readers[name], plan.caches_weights) if name in readers else None
                for name in GROUPS
            )
            assert qkv is not None
            assert out is not None
            norms = read_norms(layer, self._family)
            self._layers.append(LayerTensors(*norms, qkv, out, gate_up, down))
        if self.node is not None:
            self.gathers = LayerGathers(self._layers, self.node, self.device)
            self._layers = self.gathers.layers

    def apply_smaller(self, plan: ResolvedPlan) -> None:
        """Give up what a plan asked for, for another one that takes less; gradients are dropped."""
        for copies in self.gathered:
            copies.drop_gradients()
        for parameter in self._trainable:
            parameter.grad = None
        if plan.caches_weights == self.plan.caches_weights:
            self._plan = plan
            return
        # Before others are made.
        self._layers, self._joined = [], []
        self.apply(plan)

    @property
    def is_compiled(self) -> bool:
        """Whether layers go through ``torch.compile``."""
        return self._layer_call.is_compiled

    def run_plainly(self) -> None:
        """Compile nothing from now on."""
        for call in (self._layer_call, self._attention_call, self._softmax_call):
            if isinstance(call, Compiled):
                call.run_plainly()

    def memory_model(self) -> MemoryModel:
        """What a step takes, from shapes alone."""
        return self.measure(
            # On CUDA kernels leave no scores behind.
            keeps_scores=not (self.device.type == "cuda" and self.attention == "varlen"),
            has_triton=self._has_triton,
            is_compiled=self.is_compiled,
            state_bytes=self.state_bytes,
        )

    def begin_step(self, share: Tensor | float = 1.0, *, trained: int = 1, tokens: int = 1) -> None:
        """Take the adapters' present values; forget earlier gradients.

        Args:
            share: What the summed loss of every micro-batch will be multiplied by.
            trained: Trained tokens of the effective batch.
            tokens: All of its tokens.
        """
        # A micro-batch's routing counts by its share of the tokens, whose mean then is the step's.
        self._balance_share = self._balance * trained / max(tokens, 1)
        own = self._vocabulary.share
        own.copy_(share) if isinstance(share, Tensor) else own.fill_(share)
        for copies in self.gathered:
            copies.refresh()
            copies.clear_gradients()
        if self._joined:
            fill_joined(self._joined)

    def end_micro_batch(self) -> None:
        """Gather a micro-batch's gradients."""
        for copies in self.gathered:
            copies.gather_gradients()

    def end_step(self) -> None:
        """Hand the gathered gradients to peft's parameters."""
        for copies in self.gathered:
            copies.publish_gradients()

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Summed loss over a micro-batch's trained positions.

        Args:
            batch: On the model's device.

        Returns:
            The loss, a float32 scalar, and ``[hits, entropy]``; see
            :func:`loss.linear_cross_entropy`.
        """
        balances: list[RouterBalance] = []
        hidden = self.hidden_states(batch, balances)
        norm = self._decoder.norm
        hidden = norm(hidden.index_select(0, batch.trained))
        loss, stats = self._vocabulary.loss(
            hidden, batch.targets, self.plan.loss_chunk_tokens, self._softmax()
        )
        if balances:
            share = self._balance_share * batch.tokens
            loss = loss + share * balance_experts(balances, batch.tokens)
        return loss, stats

    def hidden_states(
        self, batch: MicroBatch, balances: list[RouterBalance] | None = None
    ) -> Tensor:
        """The last decoder layer's output, shape ``(T, H)``.

        Args:
            batch: On the model's device.
            balances: Gets what routers did, where the model's loss asks for it.
        """
        counted = batch.tokens if balances is not None and self._balance else None
        grad = torch.is_grad_enabled()
        hidden = self._vocabulary.look_up(batch.input_ids)
        places = self._positions.place(
            hidden.detach(), batch.position_ids, batch.bounds, batch.longest,
            has_mask=self.attention == "mask",
        )  # fmt: skip
        for index, (place, layer, block) in enumerate(
            zip(places, self._layers, self._experts, strict=True)
        ):
            if self.gathers is not None:
                self.gathers.before(index)
            arguments = (hidden, place, layer, self.shape)
            run = functools.partial(self._run_layer, block, counted)
            if grad and index < self.plan.checkpointed_layers:
                hidden, balance = checkpoint(
                    run,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=_draws(layer) or block is not None,
                )
            else:
                hidden, balance = run(*arguments)
            if balances is not None and balance is not None:
                balances.append(balance)
            if self.gathers is not None:
                self.gathers.after(index, hidden)
        return hidden

    @property
    def _has_triton(self) -> bool:
        """Whether compiling works on CUDA, hence Triton does."""
        return self.device.type == "cuda" and self._layer_call.is_compiled

    def _choose_gated(self, shape: LayerShape) -> Callable[[Tensor], Tensor] | None:
        if not (self._has_triton and shape.is_gated and shape.activation == "silu"):
            return None
        from qlora_kit.engines.native.layers.swiglu import swiglu

        return swiglu

    def _softmax(self) -> SoftmaxStep:
        """The step in use: where compiling the layers failed, Triton does not work either."""
        if isinstance(self._softmax_call, Compiled) or self._has_triton:
            return self._softmax_call
        return plain_softmax_step

    def _choose_softmax(self, asked: FastPlan) -> SoftmaxStep:
        if self._has_triton:
            from qlora_kit.engines.native.layers.softmax import fused_softmax_step

            return fused_softmax_step
        return Compiled(
            softmax_step, asked.compile, self.device, "the loss", otherwise=plain_softmax_step
        )

    def _run_layer(
        self, block: ExpertBlock | None, counted: int | None, *arguments: Any
    ) -> tuple[Tensor, RouterBalance | None]:
        hidden, place, layer, shape = arguments
        dynamic = (hidden, place.cos, place.sin, place.stretch, place.bounds)
        if block is None:
            if _has_modules(layer):
                return _plain_layer(*arguments), None
            return self._layer_call(*arguments, dynamic=dynamic), None
        if _has_modules(layer):
            hidden, x = attention_block(*arguments)
        else:
            hidden, x = self._attention_call(*arguments, dynamic=dynamic)
        fed, balance = block(x, counted)
        return add_fed(hidden, fed, layer, shape), balance

    def _group(self, group: GroupReader | Sequence[Any], caches: bool) -> Projections | Modules:
        if not isinstance(group, GroupReader):
            return Modules(group)
        weights, scales = group.weights, group.scales
        down, up = self._copies_of.get(id(group), (None, None))
        dropouts = group.dropouts
        if caches and scales:
            weights = [
                dequantize(
                    weights, scales, group.rows, group.columns, group.blocksize,
                    group.quant_type, self.dtype,
                )
            ]  # fmt: skip
            scales = []
            if (
                down is not None
                and up is not None
                and rounds_before_adding(self.device, self.dtype)
                and dropouts is None
            ):
                weights = [join(weights[0], len(down))]
                self._joined.append((weights[0], down, up))
        return Projections(
            weights,
            scales,
            group.rows,
            group.blocksize,
            group.quant_type,
            group.bias,
            down,
            up,
            dropouts,
        )


def _draws(layer: LayerTensors) -> bool:
    """Whether a layer draws random numbers, for dropout."""
    return any(isinstance(group, Modules) or getattr(group, "dropouts", None) for group in layer)


def _has_modules(layer: LayerTensors) -> bool:
    return any(isinstance(group, Modules) for group in layer)


def _plain_layer(*arguments: Any) -> Tensor:
    """``decoder_layer`` without kernels that need a compiler."""
    plain = (*arguments[:-1], arguments[-1]._replace(gated=None))
    return decoder_layer(*plain)
