"""A model's layers as the decoder reads them, and what must stay the same for that to hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qlora_kit.engines.native.decoding.support import find_decoding_obstacle
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.architectures import find_decoder
from qlora_kit.engines.native.layers.expert_layers import (
    ExpertBlock,
    find_block,
    find_expert_obstacle,
    sign_experts,
)
from qlora_kit.engines.native.layers.families import Family
from qlora_kit.engines.native.layers.family_reader import find_norms, list_projections, read_norms
from qlora_kit.engines.native.layers.layer import LayerTensors
from qlora_kit.engines.native.layers.peft_layers import (
    AdapterPart,
    GroupReader,
    read_adapter,
    read_group,
)

__all__ = ["DecoderLayer", "make_layer", "read_model", "sign_model"]


class DecoderLayer(NamedTuple):
    """One layer.

    Attributes:
        tensors: Its norms and its groups of projections, the latter as :class:`DecodingWeights`.
        experts: What stands in for the last two groups, or ``None``.
        window: How many tokens, itself included, a token looks at; 0 for all.
    """

    tensors: LayerTensors
    experts: ExpertBlock | None
    window: int

    def groups(self) -> tuple[DecodingWeights, ...]:
        """Its groups, in the order of :data:`family_reader.GROUPS`."""
        _, _, _, _, _, _, *groups = self.tensors
        return tuple(group for group in groups if isinstance(group, DecodingWeights))


def read_model(model: Any) -> list[dict[str, GroupReader]] | str:
    """The groups of every layer, or why the decoder does not cover the model."""
    obstacle = find_decoding_obstacle(model)
    if obstacle is not None:
        return obstacle
    dtype = _find_base(model).get_input_embeddings().weight.dtype
    decoder, family = _find_layers(model)
    layers = []
    for layer in decoder.layers:
        groups: dict[str, GroupReader] = {}
        for name, modules in list_projections(layer, family).items():
            group = read_group(modules, dtype, trains=False)
            if isinstance(group, str):
                return group
            groups[name] = group
        block = find_block(layer)
        obstacle = None if block is None else find_expert_obstacle(block, dtype)
        if obstacle is not None:
            return obstacle
        layers.append(groups)
    return layers


def make_layer(
    layer: Any, readers: dict[str, GroupReader], family: Family, dtype: torch.dtype, window: int
) -> DecoderLayer:
    """One of transformers' layers.

    Args:
        layer: The module.
        readers: What :func:`read_model` found of it.
        family: The model's.
        dtype: What it computes in.
        window: See :class:`DecoderLayer`.
    """
    groups = {name: DecodingWeights(group, dtype) for name, group in readers.items()}
    block = find_block(layer)
    return DecoderLayer(
        LayerTensors(
            *read_norms(layer, family), groups["qkv"], groups["out"], groups.get("gate_up"),
            groups.get("down"),
        ),
        None if block is None else ExpertBlock(block, dtype, None, trains=False),
        window,
    )  # fmt: skip


def sign_model(model: Any) -> object:
    """What must be the same for a decoder to be used again; adapters' values are read anew."""
    signs: list[object] = [id(_find_base(model).get_output_embeddings().weight)]
    decoder, family = _find_layers(model)
    for layer in decoder.layers:
        for norm in find_norms(layer, family).values():
            signs.extend(parameter.data_ptr() for parameter in norm.parameters())
        for modules in list_projections(layer, family).values():
            signs.extend(map(_sign_projection, modules))
        block = find_block(layer)
        signs.append(None if block is None else sign_experts(block))
    return tuple(signs)


def _sign_projection(module: Any) -> object:
    part: object = read_adapter(module, trains=False)
    if isinstance(part, AdapterPart):
        part = (part.up.data_ptr(), part.down.data_ptr(), part.scaling)
    linear = getattr(module, "base_layer", module)
    weight, bias = linear.weight, linear.bias
    return (
        weight.data_ptr(), weight._version, id(getattr(weight, "quant_state", None)),
        None if bias is None else (bias.data_ptr(), bias._version), part,
    )  # fmt: skip


def _find_layers(model: Any) -> tuple[Any, Family]:
    found = find_decoder(_find_base(model))
    assert found is not None
    return found


def _find_base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
