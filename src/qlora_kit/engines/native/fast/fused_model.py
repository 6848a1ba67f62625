"""The forward and backward pass of a micro-batch over a peft model's own tensors."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kit import ranks
from qlora_kit.engines.native.fast.adapter_copies import (
    AdapterCopies,
    Gathered,
    make_adapter_copies,
)
from qlora_kit.engines.native.fast.architectures import find_decoder
from qlora_kit.engines.native.fast.attention import AttentionKind
from qlora_kit.engines.native.fast.attention_choice import resolve_attention
from qlora_kit.engines.native.fast.compilation import Compiled
from qlora_kit.engines.native.fast.expert_layers import (
    ExpertBlock,
    RouterBalance,
    balance_experts,
    find_block,
    read_balance,
)
from qlora_kit.engines.native.fast.family_reader import (
    GROUPS,
    list_projections,
    read_norms,
    read_shape,
)
from qlora_kit.engines.native.fast.layer import (
    LayerShape,
    LayerTensors,
    Modules,
    Projections,
    add_fed,
    attention_block,
    decoder_layer,
)
from qlora_kit.engines.native.fast.layer_gathers import LayerGathers, measure_buffers
from qlora_kit.engines.native.fast.layout import MicroBatch
from qlora_kit.engines.native.fast.loss import (
    SoftmaxStep,
    plain_softmax_step,
    softmax_step,
)
from qlora_kit.engines.native.fast.peft_layers import GroupReader, read_group
from qlora_kit.engines.native.fast.plan import ResolvedPlan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.positions import Positions
from qlora_kit.engines.native.fast.projection import (
    dequantize,
    fill_joined,
    join,
    rounds_before_adding,
)
from qlora_kit.engines.native.fast.rank_sum import RankSum
from qlora_kit.engines.native.fast.shards import find_owner, give_up_layers, has_absent
from qlora_kit.engines.native.fast.step_memory import MemoryModel
from qlora_kit.engines.native.fast.vocabulary import Vocabulary
from qlora_kit.weights.absent import make_absent

__all__ = ["FusedModel"]

logger = logging.getLogger(__name__)


class FusedModel:
    """Runs micro-batches through a model with LoRA adapters.

    Args:
        model: A ``PeftModel`` that :func:`support.find_obstacle` has nothing against. It is read,
            never changed.
        asked: What the user pinned.
    """

    def __init__(self, model: Any, asked: FastPlan) -> None:
        base = model.get_base_model()
        self._model = model
        found = find_decoder(base)
        assert found is not None
        self._decoder, self._family = found
        self._trainable = [one for one in model.parameters() if one.requires_grad]
        embedding = base.get_input_embeddings().weight
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = embedding.device
        config = base.config.get_text_config()
        self._layer_call = Compiled(
            decoder_layer, asked.compile, self.device, "decoder layers", otherwise=_plain_layer
        )
        self._attention_call = Compiled(attention_block, asked.compile, self.device, "attention")
        shape = read_shape(self._decoder, config, self._family)
        self.shape = shape._replace(gated=self._choose_gated(shape))
        self.attention: AttentionKind = resolve_attention(
            asked.attention, self.device, self.dtype, self.shape
        )
        self._positions = Positions(self._decoder, config, self._family)
        blocks = [find_block(layer) for layer in self._decoder.layers]
        self._experts = [
            None if block is None else ExpertBlock(block, self.dtype, self.shape.gated)
            for block in blocks
        ]
        self._balance = read_balance(config) if any(self._experts) else 0.0
        self._readers = [self._read_layer(layer) for layer in self._decoder.layers]
        fused = [
            group for layer in self._readers for group in layer.values()
            if isinstance(group, GroupReader)
        ]  # fmt: skip
        copies: list[AdapterCopies]
        copies, self._copies_of = make_adapter_copies(fused, self.dtype)
        self._vocabulary = Vocabulary(base, self.dtype, self._family)
        #: What gathers gradients itself; everything else that trains is left to autograd.
        self.gathered: list[Gathered] = [*copies, *self._vocabulary.trained]
        self.gathered += [one for block in self._experts if block for one in block.copies]
        self.is_quantized = any(group.scales for group in fused)
        self._left_to_autograd = self._find_others(fused)
        self.rank_sum = (
            None
            if ranks.join().world == 1
            else RankSum(self.gathered, self._left_to_autograd, self.device)
        )
        self._layers: list[LayerTensors] = []
        # Cached weights that hold their adapters too, with those.
        self._joined: list[tuple[Tensor, Tensor, Tensor]] = []
        self._plan: ResolvedPlan | None = None
        #: The ranks that hold a layer each in turn; ``None`` where this one holds all.
        self.node: ranks.Node | None = None
        self.gathers: LayerGathers | None = None
        if has_absent(model):
            self.shard(ranks.join_node())
        #: Bytes of the optimizer's states for each number that trains.
        self.state_bytes = 8
        self._softmax_call = self._choose_softmax(asked)

    def _find_others(self, fused: Sequence[GroupReader]) -> list[Tensor]:
        gathered = {
            id(tensor)
            for group in fused for part in group.adapters if part is not None
            for tensor in (part.down, part.up)
        } | {id(weight.trained) for weight in self._vocabulary.trained}  # fmt: skip
        gathered |= {
            id(tensor)
            for block in self._experts if block is not None
            for copies in block.copies for tensor in copies.parameters
        }  # fmt: skip
        return [one for one in self._trainable if id(one) not in gathered]

    @property
    def plan(self) -> ResolvedPlan:
        """What was decided; set by :meth:`apply`."""
        assert self._plan is not None
        return self._plan

    @property
    def is_planned(self) -> bool:
        """Whether :meth:`apply` was called."""
        return self._plan is not None

    @property
    def is_fully_fused(self) -> bool:
        """Whether no projection is left to peft's own modules."""
        return all(
            isinstance(group, GroupReader) for layer in self._readers for group in layer.values()
        )

    @property
    def has_experts(self) -> bool:
        """Whether tokens of some layer go to experts."""
        return any(block is not None for block in self._experts)

    @property
    def is_capturable(self) -> bool:
        """Whether a micro-batch writes its gradients where a replay would write them again.

        Experts are left out: their shares of a micro-batch differ from one to the next. So is
        dropout, whose masks do.
        """
        groups = [group for layer in self._readers for group in layer.values()]
        return not (
            self._left_to_autograd
            or self.has_experts
            or any(not isinstance(group, GroupReader) or group.dropouts for group in groups)
        )

    def shard(self, node: ranks.Node) -> None:
        """Keep this rank's layers only. Every rank of the machine must do so."""
        give_up_layers(self._model, node)
        for index, layer in enumerate(self._readers):
            if find_owner(index, node) != node.position:
                for group in layer.values():
                    if isinstance(group, GroupReader):
                        group.weights[:] = [make_absent(one) for one in group.weights]
                        group.scales[:] = [make_absent(one) for one in group.scales]
        self.node = node

    def buffer_bytes(self) -> int:
        """What bringing layers from other ranks takes."""
        if self.node is None:
            return 0
        return measure_buffers([list(layer.values()) for layer in self._readers])

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

    def count_weights(self) -> int:
        """Numbers in the matrices that a token meets, experts aside."""
        groups = (group for layer in self._readers for group in layer.values())
        fused = sum(sum(g.rows) * g.columns for g in groups if isinstance(g, GroupReader))
        return fused + self._vocabulary.size * int(self._decoder.config.hidden_size)

    def memory_model(self) -> MemoryModel:
        """What a step takes, from shapes alone."""
        shape, size = self.shape, self.dtype.itemsize
        groups = [group for layer in self._readers for group in layer.values()
                  if isinstance(group, GroupReader)]  # fmt: skip
        sizes = [sum(group.rows) * group.columns * size for group in groups]
        blocks = [block for block in self._experts if block is not None]
        return MemoryModel.of_layers(
            layers=len(self._readers),
            hidden=self._decoder.config.hidden_size,
            queries=shape.heads * shape.head_dim,
            keys=shape.kv_heads * shape.head_dim,
            intermediate=self._intermediate,
            dropped=max(map(_count_dropped, self._readers)),
            routed=max((block.chosen for block in blocks), default=0),
            post_norms=self._family.post_norms,
            # On CUDA kernels leave no scores behind.
            capped_heads=shape.heads if shape.softcap and not self._keeps_scores_inside else 0,
            item_bytes=size,
            vocabulary=self._vocabulary.size,
            has_triton=self._has_triton,
            dequantized=sum(
                taken for taken, group in zip(sizes, groups, strict=True) if group.scales
            ),
            largest_group=max([0, *sizes, *(block.largest_stack * size for block in blocks)]),
            copies=sum(copies.nbytes() for copies in self.gathered),
            scales=sum(scale.nbytes for group in groups for scale in group.scales),
            trained=sum(one.numel() for one in self._trainable),
            state_bytes=self.state_bytes,
            is_compiled=self._layer_call.is_compiled,
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
        places = self._positions.place(hidden.detach(), batch, has_mask=self.attention == "mask")
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
    def _keeps_scores_inside(self) -> bool:
        """Whether kernels of attention leave no scores in memory."""
        return self.device.type == "cuda" and self.attention == "varlen"

    @property
    def _intermediate(self) -> int:
        """Width within the feed-forward block; of all experts that a token goes to."""
        widths = [block.chosen * block.intermediate for block in self._experts if block]
        for layer, block in zip(self._decoder.layers, self._experts, strict=True):
            if block is None:
                (down,) = list_projections(layer, self._family)["down"]
                widths.append(int(down.in_features))
                break
        return max(widths)

    @property
    def _has_triton(self) -> bool:
        """Whether compiling works on CUDA, hence Triton does."""
        return self.device.type == "cuda" and self._layer_call.is_compiled

    def _choose_gated(self, shape: LayerShape) -> Callable[[Tensor], Tensor] | None:
        if not (self._has_triton and shape.is_gated and shape.activation == "silu"):
            return None
        from qlora_kit.engines.native.fast.swiglu import swiglu

        return swiglu

    def _softmax(self) -> SoftmaxStep:
        """The step in use: where compiling the layers failed, Triton does not work either."""
        if isinstance(self._softmax_call, Compiled) or self._has_triton:
            return self._softmax_call
        return plain_softmax_step

    def _choose_softmax(self, asked: FastPlan) -> SoftmaxStep:
        if self._has_triton:
            from qlora_kit.engines.native.fast.softmax import fused_softmax_step

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

    def _read_layer(self, layer: Any) -> dict[str, GroupReader | Sequence[Any]]:
        groups: dict[str, GroupReader | Sequence[Any]] = {}
        for name, modules in list_projections(layer, self._family).items():
            group = read_group(modules, self.dtype)
            if isinstance(group, str):
                level = logging.INFO if layer is self._decoder.layers[0] else logging.DEBUG
                logger.log(level, "The %s projections run through peft: %s.", name, group)
                groups[name] = modules
            else:
                groups[name] = group
        return groups

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


def _count_dropped(readers: Mapping[str, GroupReader | Sequence[Any]]) -> int:
    """Width of what a layer's adapters see of their inputs through dropout."""
    return sum(
        group.columns * sum(probability > 0 for _, probability in group.dropouts or ())
        for group in readers.values()
        if isinstance(group, GroupReader)
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
