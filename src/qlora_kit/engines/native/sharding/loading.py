"""Loading a base of which each rank of a machine holds its own layers only.

transformers reads and quantizes the layers that stay; the others' weights it puts on the meta
device, without their numbers. A checkpoint that is stored in 4 bits cannot be taken apart there: it
is read into the host's memory, whole on every rank, and only what stays goes to the card.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import torch

from qlora_kit import ranks
from qlora_kit.config import LoadConfig
from qlora_kit.engines.base_model import OpenedCheckpoint
from qlora_kit.engines.native.layers.architectures import find_architecture_obstacle
from qlora_kit.engines.native.sharding.shards import (
    find_owner,
    give_up_layers,
    held_bytes,
    stand_in_for_meta,
)
from qlora_kit.errors import ConfigError, EngineError

__all__ = ["choose_node", "finish_loading", "make_device_map"]

logger = logging.getLogger(__name__)

_LAYER: Final = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\..*\.weight$")
#: Of 16-bit weights' bytes, what 4-bit ones and their scales take.
_QUANTIZED_SHARE: Final = 0.29
#: Part of a card's memory that a base may take and leave room for a step.
_MOST_SHARE: Final = 0.9
#: What accelerate puts over a model's own methods where it spreads it over devices.
_WRAPPED: Final = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


def choose_node(config: LoadConfig, opened: OpenedCheckpoint) -> ranks.Node | None:
    """The ranks to spread a base over, ``None`` where each loads all of it.

    Where it is spread, every rank must load it. Otherwise nobody is asked: a script may load a
    model in one rank alone.

    Raises:
        ConfigError: When it is to be sharded and there is nobody to share it with.
        EngineError: When this model's layers cannot be.
    """
    if config.shard is False:
        return None
    obstacle = find_architecture_obstacle(opened.model_config.to_dict())
    if obstacle is None and opened.quantization == "int8":
        obstacle = "8-bit weights cannot be sent around"
    if obstacle is None and getattr(opened.model_config, "num_experts_per_tok", None):
        obstacle = "every rank computes with all of its experts"
    if obstacle is None and config.device_map is not None:
        obstacle = "device_map spreads it otherwise"
    if config.shard == "auto":
        if ranks.find_place().world == 1 or obstacle is not None or not _is_too_large(opened):
            return None
        node = ranks.join_node()
        return node if len(node.members) > 1 else None
    node = ranks.join_node()
    if len(node.members) == 1:
        raise ConfigError(
            "load_quantized is asked for a sharded base (shard=True), and this machine has one "
            "process of the run, which holds all of it. Start one process per card, or leave shard "
            "to 'auto'."
        )
    if obstacle is not None:
        raise EngineError(f"{opened.folder} cannot be sharded: {obstacle}. Load with shard=False.")
    return node


def make_device_map(opened: OpenedCheckpoint, node: ranks.Node) -> dict[str, torch.device]:
    """Where each tensor goes: to the card, or to the meta device where another rank holds it."""
    from transformers import AutoModelForCausalLM

    if opened.stored:
        return {"": torch.device("cpu")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(opened.model_config)
    names = dict.fromkeys([*model.state_dict(), *(name for name, _ in model.named_buffers())])
    shapes = {name: tensor.dim() for name, tensor in model.named_parameters()}
    places = {}
    for name in names:
        found = _LAYER.match(name)
        is_here = (
            found is None
            or shapes.get(name, 1) == 1
            or find_owner(int(found[1]), node) == node.position
        )
        places[name] = opened.device if is_here else torch.device("meta")
    return places


def finish_loading(model: Any, opened: OpenedCheckpoint, node: ranks.Node) -> None:
    """Take off what accelerate put on, and let every weight show its shape on the card."""
    from accelerate.hooks import remove_hook_from_submodules

    model.requires_grad_(False)
    remove_hook_from_submodules(model)
    for name in (*_WRAPPED, "hf_device_map"):
        model.__dict__.pop(name, None)
    if opened.stored:
        give_up_layers(model, node)
        _move(model, opened.device)
    stand_in_for_meta(model, opened.device)
    logger.info(
        "Each of %d ranks holds its share of the base: %.2f GiB of its layers on this one.",
        len(node.members), held_bytes(model) / 2**30,
    )  # fmt: skip


def _is_too_large(opened: OpenedCheckpoint) -> bool:
    if opened.device.type != "cuda":
        return False
    size = sum(file.stat().st_size for file in opened.folder.glob("*.safetensors"))
    if opened.quantization and not opened.stored:
        size = int(size * _QUANTIZED_SHARE)
    # Not what is free, which differs between cards, and all must find the same.
    memory: int = torch.cuda.get_device_properties(opened.device).total_memory
    return size > _MOST_SHARE * memory


def _move(model: Any, device: torch.device) -> None:
    """Move what a model holds; stand-ins, which would be filled up, are made anew there."""
    from qlora_kit.weights.absent import is_absent, make_absent

    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if is_absent(weight):
                weight.data = make_absent(weight.detach().as_subclass(torch.Tensor), device)
                if getattr(weight, "quant_state", None) is not None:
                    weight.quant_state.absmax = make_absent(weight.quant_state.absmax, device)
                    weight.quant_state.code = weight.quant_state.code.to(device)
            else:
                module._parameters[name] = weight.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    model.tie_weights()
