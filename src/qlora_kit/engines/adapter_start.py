"""What an adapter's start took out of the base's weights, kept so that it can be taken out again.

PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775) and their kin begin A and B with a part of each
weight and leave the rest in the base. A saved adapter holds A and B as they are now: the base it
belongs to is made of the base on disk and of the start. A checkpoint keeps the seed, with which
peft computes the same start on the same machine, a digest of the base that came out, and A and B
as they began, from which another machine makes it to the rounding of its numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.device import fork_generators
from qlora_kit.engines.saved_adapter_config import changes_base
from qlora_kit.errors import UnsupportedModelError
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterStart",
    "capture_start",
    "check_start_is_known",
    "read_start",
    "repeat_start",
    "restore_base",
    "write_start",
]

logger = logging.getLogger(__name__)

#: Those that peft computes anew from the base alone, and comes to the same every time.
_REPEATABLE: Final = ("pissa", "olora")
_FACTORS: Final = ("lora_A", "lora_B")
_FILE: Final = "adapter_start.safetensors"


@dataclass(frozen=True)
class AdapterStart:
    """How an adapter began whose start changed the base.

    Attributes:
        factors: A and B on the CPU, by layer, in the dtype that peft rounds them to.
        random_state: The seed they were drawn with.
        digest: sha256 of the base's weights afterwards.
    """

    factors: Mapping[str, torch.Tensor]
    random_state: int
    digest: str


def capture_start(model: Any, random_state: int) -> AdapterStart | None:
    """The start of a fresh adapter; ``None`` where it left the base as it was.

    Args:
        model: The ``PeftModel``.
        random_state: The seed it was drawn with.
    """
    if not changes_base(model.peft_config["default"].init_lora_weights):
        return None
    factors = {
        f"{path}.{name}": getattr(layer, name)["default"].weight.detach().clone().cpu()
        for path, layer in _find_layers(model).items()
        for name in _FACTORS
    }
    return AdapterStart(factors, random_state, _digest_base(model))


def write_start(start: AdapterStart | None, folder: Path) -> None:
    """Write a start into a checkpoint; nothing where there is none."""
    from safetensors.torch import save_file

    if start is not None:
        factors = {name: tensor.contiguous() for name, tensor in start.factors.items()}
        said = {"random_state": str(start.random_state), "digest": start.digest}
        save_file(factors, str(folder / _FILE), metadata=said)


def read_start(folder: Path) -> AdapterStart | None:
    """What :func:`write_start` wrote; ``None`` where it wrote nothing.

    Raises:
        UnsupportedModelError: When the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            said = file.metadata() or {}
            factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return AdapterStart(factors, int(said["random_state"]), said["digest"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"{path} is damaged: {error}. Copy the checkpoint again, or take another."
        ) from error


def check_start_is_known(asked: Any, start: AdapterStart | None, folder: Path) -> None:
    """Refuse an adapter whose start was drawn at random and not kept.

    Args:
        asked: Its ``init_lora_weights``.
        start: What its folder keeps of the start.
        folder: Where it is from.

    Raises:
        UnsupportedModelError: Says how to save it.
    """
    if not changes_base(asked) or asked in _REPEATABLE or start is not None:
        return
    raise UnsupportedModelError(
        f"The adapter in {folder} was started by {asked!r}, which changed the base's weights in "
        "a way that the folder does not keep and nothing can compute again. Where it is still in "
        "memory, peft's save_pretrained with path_initial_model_for_weight_conversion, or an "
        "export of format 'lora' here, writes an adapter for the base as it is."
    )


@contextlib.contextmanager
def repeat_start(start: AdapterStart | None) -> Iterator[None]:
    """While it lasts, peft draws what it drew when the adapter was new."""
    import torch

    with fork_generators():
        if start is not None:
            torch.manual_seed(start.random_state)
        yield


def restore_base(
    model: Any, start: AdapterStart | None, base: Path, folder: Path
) -> AdapterStart | None:
    """See that the base is the one the adapter belongs to, after peft repeated the start.

    Args:
        model: The ``PeftModel``; its base is changed in place where peft came to another one.
        start: How the adapter began.
        base: Where the base lies on disk.
        folder: Where the start is from.

    Returns:
        The start of the base as it is now.

    Raises:
        UnsupportedModelError: When the start is another adapter's, or of another base.
    """
    import torch

    if start is None or _digest_base(model) == start.digest:
        return start
    layers = _find_layers(model)
    names = {f"{path}.{name}" for path in layers for name in _FACTORS}
    with SafetensorsSource(base) as files:
        wrong = sorted(names ^ set(start.factors)) or sorted(
            {f"{path}.weight" for path in layers} - set(files.names())
        )
        if wrong:
            raise UnsupportedModelError(
                f"{folder / _FILE} does not belong to the adapter and the base in {base}: "
                f"{wrong[0]} is not in all of them. Copy the checkpoint again, or take another."
            )
        for path, layer in layers.items():
            weight = layer.get_base_layer().weight
            a, b = (
                start.factors[f"{path}.{name}"].to(weight.device, torch.float32)
                for name in _FACTORS
            )
            taken = layer.scaling["default"] * b @ a
            original = files.load(f"{path}.weight").to(weight.device, torch.float32)
            rest = original - (taken.T if layer.fan_in_fan_out else taken)
            layer.get_base_layer().weight.data = rest.to(weight.dtype)
    logger.warning(
        "This machine computes the start of the adapter in %s otherwise than the one it was "
        "trained on; its base is made from the start as it was saved, exact to the rounding of %s.",
        folder, str(weight.dtype).removeprefix("torch."),
    )  # fmt: skip
    return dataclasses.replace(start, digest=_digest_base(model))


def _digest_base(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for path, layer in _find_layers(model).items():
        weight = layer.get_base_layer().weight.detach().cpu().contiguous()
        digest.update(path.encode())
        digest.update(weight.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _find_layers(model: Any) -> dict[str, Any]:
    """The adapted linear layers, by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
