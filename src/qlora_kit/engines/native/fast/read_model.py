"""What a training step reads of a peft model, and what is known of it without computing.

Nothing is changed but by :meth:`ReadModel.shard`, which gives up what other ranks hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit import ranks
from qlora_kit.engines.native.fast.adapter_copies import Gathered, make_adapter_copies
from qlora_kit.engines.native.fast.step_memory import MemoryModel
from qlora_kit.engines.native.layers.architectures import find_decoder
from qlora_kit.engines.native.layers.expert_layers import ExpertBlock, find_block
from qlora_kit.engines.native.layers.family_reader import list_projections, read_shape
from qlora_kit.engines.native.layers.layer import LayerShape
from qlora_kit.engines.native.layers.peft_layers import GroupReader, read_group
from qlora_kit.engines.native.layers.vocabulary import Vocabulary
from qlora_kit.engines.native.sharding.layer_gathers import measure_buffers
from qlora_kit.engines.native.sharding.shards import find_owner, give_up_layers, has_absent
from qlora_kit.weights.absent import make_absent

__all__ = ["ReadModel"]

logger = logging.getLogger(__name__)


class ReadModel:
    """A peft model's own tensors, layer by layer.

    Args:
        model: A ``PeftModel`` that :func:`support.find_obstacle` has nothing against.
        choose_gated: Gives a shape's kernel for ``silu(gate) * up``, or ``None``.

    Attributes:
        gathered: What gathers gradients itself; everything else that trains is left to autograd.
        node: The ranks that hold a layer each in turn; ``None`` where this one holds all.
    """

    def __init__(
        self,
        model: Any,
        choose_gated: Callable[[LayerShape], Callable[[Tensor], Tensor] | None],
    ) -> None:
        base = model.get_base_model()
        self._model = model
        found = find_decoder(base)
        assert found is not None
        self._decoder, self._family = found
        self._config = base.config.get_text_config()
        self._trainable = [one for one in model.parameters() if one.requires_grad]
        embedding = base.get_input_embeddings().weight
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = embedding.device
        shape = read_shape(self._decoder, self._config, self._family)
        self.shape = shape._replace(gated=choose_gated(shape))
        self._experts = [
            None if block is None else ExpertBlock(block, self.dtype, self.shape.gated)
            for block in map(find_block, self._decoder.layers)
        ]
        self._readers = [self._read_layer(layer) for layer in self._decoder.layers]
        fused = [
            group for layer in self._readers for group in layer.values()
            if isinstance(group, GroupReader)
        ]  # fmt: skip
        copies, self._copies_of = make_adapter_copies(fused, self.dtype)
        self._vocabulary = Vocabulary(base, self.dtype, self._family)
        self.gathered: list[Gathered] = [*copies, *self._vocabulary.trained]
        self.gathered += [one for block in self._experts if block for one in block.copies]
        self.is_quantized = any(group.scales for group in fused)
        self._left_to_autograd = self._find_others(fused)
        self.node: ranks.Node | None = None
        if has_absent(model):
            self.shard(ranks.join_node())

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

    def count_weights(self) -> int:
        """Numbers in the matrices that a token meets, experts aside."""
        groups = (group for layer in self._readers for group in layer.values())
        fused = sum(sum(g.rows) * g.columns for g in groups if isinstance(g, GroupReader))
        return fused + self._vocabulary.size * int(self._decoder.config.hidden_size)

    def measure(
        self, *, keeps_scores: bool, has_triton: bool, is_compiled: bool, state_bytes: int
    ) -> MemoryModel:
        """What a step takes, from shapes alone.

        Args:
            keeps_scores: Whether soft-capped attention leaves scores in memory.
            has_triton: As :meth:`MemoryModel.of_layers` takes it, like what follows.
            is_compiled: The same.
            state_bytes: The same.
        """
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
            capped_heads=shape.heads if shape.softcap and keeps_scores else 0,
            item_bytes=size,
            vocabulary=self._vocabulary.size,
            has_triton=has_triton,
            dequantized=sum(
                taken for taken, group in zip(sizes, groups, strict=True) if group.scales
            ),
            largest_group=max([0, *sizes, *(block.largest_stack * size for block in blocks)]),
            copies=sum(copies.nbytes() for copies in self.gathered),
            scales=sum(scale.nbytes for group in groups for scale in group.scales),
            trained=sum(one.numel() for one in self._trainable),
            state_bytes=state_bytes,
            is_compiled=is_compiled,
        )

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


def _count_dropped(readers: Mapping[str, GroupReader | Sequence[Any]]) -> int:
    """Width of what a layer's adapters see of their inputs through dropout."""
    return sum(
        group.columns * sum(probability > 0 for _, probability in group.dropouts or ())
        for group in readers.values()
        if isinstance(group, GroupReader)
    )
