"""A frozen base of which each rank of a machine holds a part: whole decoder layers.

Layers lie on the ranks in turn. A layer has one owner, and not a piece on every rank, because
loading then reads a layer once per machine and quantizes it there, and whoever wants a tensor gets
it from one place; when a layer is sent to all, each rank receives as much either way. Embeddings,
head, norms, biases and adapters stay on every rank.

:mod:`.layer_gathers` brings layers to where they are computed; here they are given up and
brought back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from qlora_kit import ranks
from qlora_kit.device import measure_free_bytes
from qlora_kit.engines.native.layers.architectures import find_decoder
from qlora_kit.errors import ConfigError, EngineError
from qlora_kit.messages import Setting
from qlora_kit.weights.absent import is_absent, make_absent

__all__ = [
    "find_owner", "give_up_layers", "has_absent", "held_bytes", "make_whole",
    "refuse_reading_start", "stand_in_for_meta", "whole_while_read",
]  # fmt: skip

logger = logging.getLogger(__name__)

_QUANTIZED = "Params4bit"
#: A whole base needs this much more than its bytes: what is received before it is in place.
_MARGIN = 1.05


def find_owner(layer: int, node: ranks.Node) -> int:
    """The position in the node of the rank that holds a layer."""
    return layer % len(node.members)


def has_absent(model: Any) -> bool:
    """Whether other ranks hold some of a model's weights."""
    return any(is_absent(parameter) for parameter in model.parameters())


def held_bytes(model: Any) -> int:
    """Bytes of the decoder layers' frozen weights on this rank."""
    return sum(
        part.untyped_storage().nbytes()
        for layer in _find_layers(model)
        for _, _, weight in _find_weights(layer)
        if not is_absent(weight)
        for part in _take_apart(weight).values()
    )


def give_up_layers(model: Any, node: ranks.Node) -> None:
    """Keep this rank's layers only; the others' weights show their shapes from then on."""
    for index, layer in enumerate(_find_layers(model)):
        if find_owner(index, node) != node.position:
            for module, _, weight in _find_weights(layer):
                if not is_absent(weight):
                    _give_up(module, weight)


def make_whole(model: Any) -> None:
    """Bring the layers back that other ranks hold. Every rank of the machine must ask.

    Where a whole base does not fit a card, the main rank alone gets it, in the host's memory.

    Raises:
        TrainingError: When another rank is gone.
    """
    if not has_absent(model):
        return
    node = ranks.join_node()
    layers = _find_layers(model)
    missing = sum(
        weight.numel() * weight.element_size()
        for layer in layers for _, _, weight in _find_weights(layer) if is_absent(weight)
    )  # fmt: skip
    device = model.get_input_embeddings().weight.device
    free = measure_free_bytes(device)
    fits = not node.find_most(int(missing * _MARGIN > free))
    logger.info(
        "Bringing the base together from %d ranks, %.2f GiB%s.",
        len(node.members), missing / 2**30, "" if fits else ", in the main rank's host memory",
    )  # fmt: skip
    for index, layer in enumerate(layers):
        owner = find_owner(index, node)
        for module, name, weight in _find_weights(layer):
            parts = _exchange(weight, owner, node, device)
            if owner == node.position:
                continue
            if fits:
                _put_together(module, name, weight, parts)
            elif ranks.is_main():
                host = {key: part.cpu() for key, part in parts.items()}
                _put_together(module, name, weight, host)


@contextlib.contextmanager
def whole_while_read(model: Any) -> Iterator[None]:
    """All of a model on every rank, as long as somebody reads it. Every rank must read.

    Raises:
        EngineError: When a card does not hold all of it.
    """
    if ranks.find_place().world == 1:
        yield
        return
    is_sharded = has_absent(model)
    if is_sharded and ranks.others_wait():
        raise EngineError(
            "The base is sharded, and the ranks that hold the rest of it wait for this one. Load "
            "with shard=False, or let the training come to its end first."
        )
    if is_sharded:
        logger.info("The base is sharded: reading it takes every rank of the machine.")
        with ranks.join_node().naming_missing("Reading a sharded base, as every answer does,"):
            make_whole(model)
    devices = {one.device for one in model.parameters()}
    if has_absent(model) or (len(devices) > 1 and not hasattr(model, "hf_device_map")):
        raise EngineError(
            "The base does not fit one card, so the model cannot be run as a whole here. Export it "
            "with verify=False, and train without sample_prompts."
        )
    if not is_sharded:
        yield
        return
    try:
        yield
    finally:
        from qlora_kit.engines.native.decoding.decoders import release_decoder

        # What it keeps are references to weights that leave.
        release_decoder(model)
        give_up_layers(model, ranks.join_node())


def refuse_reading_start(model: Any, config: Any) -> None:
    """Refuse an adapter that starts from weights which other ranks hold.

    Raises:
        ConfigError: For DoRA, LoftQ, OLoRA and PiSSA.
    """
    start = config.init_lora_weights
    reads = "use_dora" if config.use_dora else ""
    if config.loftq_config or start not in (True, False, "gaussian", "orthogonal"):
        reads = "init_lora_weights"
    if reads and ranks.find_place().world > 1 and has_absent(model):
        raise ConfigError(
            Setting(reads, getattr(config, reads), "attach_lora"),
            " starts from the base's weights, of which this rank holds a part only. Load with ",
            Setting("shard", False, "load_quantized"),
            ", or start the adapter plainly.",
            parameter=reads,
        )


def stand_in_for_meta(model: Any, device: torch.device) -> None:
    """Let weights that were loaded without their numbers show what they will be once quantized."""
    for layer in _find_layers(model):
        for module, name, weight in _find_weights(layer):
            if weight.is_meta:
                _replace_meta(module, name, weight, device)


def _find_layers(model: Any) -> list[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = find_decoder(base)
    if found is None:
        raise EngineError(
            f"A {type(base).__name__} cannot be sharded: the fast training step does not compute "
            "it. Load and train it with shard=False."
        )
    return list(found[0].layers)


def _find_weights(layer: Any) -> Iterator[tuple[Any, str, Any]]:
    """A layer's frozen matrices, with the modules that have them; no adapters."""
    for path, module in layer.named_modules():
        if "lora_" not in path:
            for name, weight in module._parameters.items():
                if weight is not None and not weight.requires_grad and weight.dim() > 1:
                    yield module, name, weight


def _take_apart(weight: Any) -> dict[str, Tensor]:
    """A weight's tensors by name: its numbers, and what bitsandbytes keeps beside packed ones."""
    parts = {"": weight.detach().as_subclass(Tensor)}
    state = getattr(weight, "quant_state", None)
    return parts if state is None else {**parts, **state.as_dict(packed=True)}


def _give_up(module: Any, weight: Any) -> None:
    state = getattr(weight, "quant_state", None)
    weight.data = make_absent(weight.detach().as_subclass(Tensor))
    if state is not None:
        _set_state(module, weight, _make_state(
            tuple(state.shape), state.blocksize, state.quant_type, state.dtype, weight.device
        ))  # fmt: skip


def _replace_meta(module: Any, name: str, weight: Any, device: torch.device) -> None:
    if type(weight).__name__ != _QUANTIZED:
        stand_in = torch.nn.Parameter(make_absent(weight, device), requires_grad=False)
        module._parameters[name] = stand_in
        return
    count = weight.numel()
    packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, device="meta")
    made = type(weight)(
        make_absent(packed, device), requires_grad=False, blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics, quant_type=weight.quant_type,
        quant_storage=weight.quant_storage, module=module, bnb_quantized=True,
    )  # fmt: skip
    module._parameters[name] = made
    shape = (weight.shape[0], weight.shape[1])
    _set_state(
        module, made, _make_state(shape, weight.blocksize, weight.quant_type, weight.dtype, device)
    )


def _make_state(
    shape: tuple[int, ...], blocksize: int, quant_type: str, dtype: torch.dtype,
    device: torch.device,
) -> Any:  # fmt: skip
    """What bitsandbytes keeps beside packed weights, without its numbers."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    blocks = -(-shape[0] * shape[1] // blocksize)
    absmax = torch.empty(blocks, dtype=torch.float32, device="meta")
    return QuantState(
        absmax=make_absent(absmax, device),
        shape=torch.Size(shape),
        code=get_4bit_type(quant_type, device=device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
    )


def _set_state(module: Any, weight: Any, state: Any) -> None:
    weight.quant_state = state
    if getattr(module, "quant_state", None) is not None:
        module.quant_state = state


def _exchange(weight: Any, owner: int, node: ranks.Node, device: torch.device) -> dict[str, Tensor]:
    """A weight's tensors, from its owner to every rank of the machine."""
    source = node.members[owner]
    is_owner = owner == node.position
    parts = _take_apart(weight) if is_owner else {}
    said = [[(name, tuple(part.shape), part.dtype) for name, part in parts.items()]]
    distributed.broadcast_object_list(said, source, node.group, device=torch.device("cpu"))
    received = {}
    for name, shape, dtype in said[0]:
        part = (
            parts[name].to(device).contiguous()
            if is_owner
            else torch.empty(shape, dtype=dtype, device=device)
        )
        distributed.broadcast(part, source, node.group)
        received[name] = part
    return received


def _put_together(module: Any, name: str, weight: Any, parts: Mapping[str, Tensor]) -> None:
    """Give a weight its numbers back; the parameter stays the same one."""
    numbers, state = parts[""], {key: part for key, part in parts.items() if key}
    if not state:
        weight.data = numbers
        return
    from bitsandbytes.functional import QuantState

    weight.data = numbers
    _set_state(module, weight, QuantState.from_dict(state, device=numbers.device))
