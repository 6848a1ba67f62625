"""The tensors of an adapter as peft stores them.

An adapter that was started by PiSSA, OLoRA or CorDA belongs to base weights that were
changed in memory. It is rewritten here as a plain LoRA of twice the rank that belongs to
the base as it is on disk (PiSSA, arXiv:2404.02948, appendix C), so that it loads anywhere,
on a quantized base too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.device import fork_generators
from qlora_kit.errors import UnsupportedModelError
from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.messages import Call
from qlora_kit.weights.live import (
    LiveTensor,
    check_adapters,
    check_trained,
    collect_live_tensors,
    get_hf_model,
)
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHANGES_BASE",
    "AdapterTensors",
    "find_active_adapter",
    "is_vocabulary_resized",
    "read_adapter_state",
]

#: Initializations that take their starting point out of the base weights.
CHANGES_BASE: Final = ("pissa", "olora", "corda", "lora_ga")

# As in the LoftQ start: oversampling and power iterations of the randomized SVD.
_OVERSAMPLE: Final = 8
_POWER_ITERATIONS: Final = 4


def find_active_adapter(model: LoadedModel, *, instead: str) -> tuple[AdaptedModel, str]:
    """The one adapter that a format without a merge can write: its model, and its name.

    Args:
        model: A model with exactly one active adapter.
        instead: What to export otherwise, a sentence for the message.

    Raises:
        UnsupportedModelError: When no adapter or more than one is active.
    """
    if not isinstance(model, AdaptedModel):
        raise UnsupportedModelError(
            "This model has no adapter to write. ",
            Call("attach_lora", "Use attach_lora first, and train it."),
            f" {instead}",
        )
    active: list[str] = list(getattr(model.model, "active_adapters", []))
    if len(active) != 1:
        raise UnsupportedModelError(
            f"Exactly one adapter must be active to be written, and {len(active)} are "
            f"({', '.join(active) or 'none'}). Choose with model.model.set_adapter(name). {instead}"
        )
    return model, active[0]


def read_adapter_state(model: LoadedModel, adapter: str) -> dict[str, torch.Tensor]:
    """Everything that belongs to an adapter, under the names that peft saves it by.

    The base's own tensors are among it where they differ from the base on disk: those that came
    with a saved adapter, and the embeddings of a vocabulary that was resized.

    Args:
        model: The model with the adapter on it.
        adapter: Its name in memory.
    """
    from peft import get_peft_model_state_dict

    # Said outright, because peft's "auto" asks the hub whether the base has a config.
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model.model, adapter_name=adapter, save_embedding_layers=is_vocabulary_resized(model)
    )
    carried = set(getattr(model, "carried_tensors", ())) - set(state)
    if carried:
        whole = model.model.state_dict()
        state |= {name: whole[name] for name in sorted(carried)}
    return state


def is_vocabulary_resized(model: LoadedModel) -> bool:
    """Whether the model in memory has another number of token embeddings than its files."""
    hf_model = get_hf_model(model.model)
    embedding = hf_model.get_input_embeddings()
    name = next((name for name, module in hf_model.named_modules() if module is embedding), None)
    try:
        with SafetensorsSource(model.base.path) as files:
            if f"{name}.weight" not in files.names():
                return False
            return files.shape(f"{name}.weight")[0] != int(embedding.weight.shape[0])
    except (FileNotFoundError, UnsupportedModelError):
        return False


class AdapterTensors:
    """The active adapter of a model, under the names in ``adapter_model.safetensors``.

    Args:
        model: A model with exactly one active LoRA adapter. It is only read.

    Attributes:
        adapter: The adapter's name in memory.
        config: Its live peft configuration.

    Raises:
        UnsupportedModelError: When no adapter or more than one is active.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.adapter = find_active_adapter(
            model, instead="Format 'merged_16bit' writes the model itself."
        )
        self.config = model.model.peft_config[self.adapter]
        check_adapters(model.model)
        check_trained(model.model)
        self._tensors = read_adapter_state(self.model, self.adapter)
        if not self._tensors:
            raise UnsupportedModelError(
                f"The active adapter {self.adapter!r} has no tensors in this model. Activate one "
                "with model.set_adapter(name)."
            )
        self._layers = self._find_layers() if self.is_converted else {}

    def _find_layers(self) -> dict[str, LiveTensor]:
        return {
            name: live
            for name, live in collect_live_tensors(self.model.model).items()
            if live.adapters and live.key == "weight"
        }

    @property
    def is_converted(self) -> bool:
        """Whether the adapter is rewritten as a plain LoRA of twice the rank."""
        init = self.config.init_lora_weights
        return isinstance(init, str) and init.lower().startswith(CHANGES_BASE)

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._tensors[name].shape)
        axis = self._rank_axis(name)
        if axis is not None:
            shape[axis] *= 2
        return tuple(shape)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype :meth:`load` returns."""
        return self._tensors[name].dtype

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        import torch

        tensor = self._tensors[name].detach()
        axis = self._rank_axis(name)
        if axis is None:
            return tensor.cpu()
        taken = self._take_start(name)[axis]
        return torch.cat([tensor.float(), taken.to(tensor.device)], dim=axis).to(tensor.dtype).cpu()

    def config_updates(self) -> dict[str, Any]:
        """What ``adapter_config.json`` must say differently from the live configuration."""
        if not self.is_converted:
            # A starting point is no part of a finished adapter, and some recompute it on loading.
            return {"init_lora_weights": True}
        factor = math.sqrt(2) if self.config.use_rslora else 2
        return {
            "init_lora_weights": True,
            "r": self.config.r * 2,
            "lora_alpha": self.config.lora_alpha * factor,
            "rank_pattern": {k: v * 2 for k, v in (self.config.rank_pattern or {}).items()},
            "alpha_pattern": {k: v * factor for k, v in (self.config.alpha_pattern or {}).items()},
        }

    def _rank_axis(self, name: str) -> int | None:
        """The axis of a converted A (0) or B (1) that is the rank."""
        if not self.is_converted:
            return None
        if name.endswith(".lora_A.weight"):
            return 0
        return 1 if name.endswith(".lora_B.weight") else None

    def _take_start(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, with B negated, whose product is what the start took out of the base."""
        import torch

        path = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        live: LiveTensor = self._layers[f"{path}.weight"]
        with SafetensorsSource(self.model.base.path) as files:
            if live.name not in files.names():
                raise UnsupportedModelError(
                    f"The adapter was started by {self.config.init_lora_weights!r}, and "
                    f"{self.model.base.path} has no {live.name} to compare with. Use format "
                    "'merged_16bit'."
                )
            original = files.load(live.name).float().to(live.tensor.device)
        rank, scale = live.layer.r[self.adapter], live.layer.scaling[self.adapter]
        taken = original - live.tensor.detach().float()
        with fork_generators():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(
                taken, q=min(rank + _OVERSAMPLE, *taken.shape), niter=_POWER_ITERATIONS
            )
        root = (s[:rank] / scale).sqrt()
        return root[:, None] * v[:, :rank].T, -u[:, :rank] * root
