"""The tensors of a model in memory, under the names its checkpoint has.

peft hides the base weights behind wrappers (``base_layer``, ``modules_to_save``); this
module looks through them and says which adapters act on which tensor. It refuses every
wrapper it does not know, because a weight that is quietly left out is the worst bug an
export can have. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import ExportError, UnsupportedModelError
from qlora_kit.weights.absent import is_absent

if TYPE_CHECKING:
    import torch

__all__ = [
    "LiveTensor",
    "check_adapters",
    "check_trained",
    "collect_live_tensors",
    "drop_tied_copies",
    "get_hf_model",
]

_OFFLOADED: Final = (
    "is offloaded and not in memory. Load the model without device_map, or on a device that holds "
    "it whole."
)


_KEEP_IT: Final = "Format 'lora' keeps it as it is."
#: Why a variant of LoRA has no merged weights, where that has a reason of its own.
_REASONS: Final = {
    "ALoraLinearVariant": "is at work only after its invocation tokens, so that no merged weight "
    "can stand for it",
}


@dataclass(frozen=True)
class LiveTensor:
    """One tensor of the base model and the LoRA layer that acts on it, if any.

    Attributes:
        name: Its Hugging Face name, for example ``"model.layers.0.mlp.up_proj.weight"``.
        module: The module that owns it (peft's wrappers taken off).
        key: The parameter's name in that module, for example ``"weight"``.
        layer: The peft LoRA layer around the module, or ``None``.
        adapters: Names of the active adapters of that layer that change this tensor.
        is_replaced: Whether it belongs to a module trained in full (``modules_to_save``).
        tokens: peft's layer around an embedding whose rows for some tokens were trained
            (``trainable_token_indices``), or ``None``.
    """

    name: str
    module: Any
    key: str
    layer: Any = None
    adapters: tuple[str, ...] = ()
    is_replaced: bool = False
    tokens: Any = None

    @property
    def tensor(self) -> torch.Tensor:
        """The stored tensor; packed integers when it is quantized."""
        value: torch.Tensor = getattr(self.module, self.key)
        return value

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes holds it in 4 or 8 bits."""
        return type(self.tensor).__name__ in ("Params4bit", "Int8Params") and (
            not self.tensor.dtype.is_floating_point
        )

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes it: through LoRA, or by replacing it or some of its rows."""
        return bool(self.adapters) or self.is_replaced or self.tokens is not None

    @property
    def is_turned(self) -> bool:
        """Whether it is in memory the other way round than in its checkpoint.

        transformers turns the weights of ``Conv1D`` layers before it quantizes them.
        """
        from transformers.pytorch_utils import Conv1D

        origin = getattr(self.module, "source_cls", object)
        return self.key == "weight" and self.is_quantized and issubclass(origin, Conv1D)

    @property
    def is_transposed(self) -> bool:
        """Whether rows are inputs: embeddings, and the ``Conv1D`` layers of GPT-2."""
        return (
            self.is_turned
            or bool(self.layer.lora_embedding_A)
            or getattr(self.layer, "fan_in_fan_out", False)
        )

    @property
    def is_parameter(self) -> bool:
        """Whether the adapter is of the parameter itself, such as a stack of experts."""
        return getattr(self.layer, "parameter_name", None) == self.key

    @property
    def is_dora(self) -> bool:
        """Whether its one active adapter is a DoRA adapter."""
        return self.key == "weight" and any(a in self.layer.lora_variant for a in self.adapters)

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A of shape (r, in) and B of shape (out, r); the update is ``scaling * B @ A``."""
        if adapter in self.layer.lora_embedding_A:
            a, b = self.layer.lora_embedding_A[adapter], self.layer.lora_embedding_B[adapter]
        else:
            a, b = self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight
        return a.detach(), b.detach()

    def replaced_rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows that were trained alone: index and values."""
        if self.tokens is not None:
            for adapter in self.tokens.active_adapters:
                rows = self.tokens.trainable_tokens_delta.get(adapter, ())
                yield from zip(self.tokens.token_indices.get(adapter, ()), rows, strict=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint: neither packed nor turned."""
        state = getattr(self.tensor, "quant_state", None)
        shape = tuple(self.tensor.shape if state is None else state.shape)
        return shape[::-1] if self.is_turned else shape

    @property
    def identity(self) -> tuple[int, int | None]:
        """Equal for two names exactly when the model computes with the same values for both."""
        if self.tokens is not None:
            # The layer around a tied head shares the rows, not the object.
            return id(self.tensor), id(self.tokens.trainable_tokens_delta)
        return id(self.tensor), id(self.layer) if self.adapters else None


def get_hf_model(model: Any) -> Any:
    """The transformers model inside a ``PeftModel``, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def collect_live_tensors(model: Any) -> dict[str, LiveTensor]:
    """Every parameter and persistent buffer by name, tied copies included.

    Args:
        model: A transformers model, or a ``PeftModel`` over one.

    Raises:
        UnsupportedModelError: When the model holds something that cannot be merged: an adapter
            of another kind than LoRA and DoRA, adapters that are switched off or already
            merged, or weights that are not in memory.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        check_adapters(model)
    found = {tensor.name: tensor for tensor in _walk(get_hf_model(model), "")}
    if isinstance(model, PeftModel) and not any(t.is_adapted for t in found.values()):
        raise UnsupportedModelError(
            f"The active adapter {', '.join(map(repr, model.active_adapters)) or '(none)'} changes "
            "no tensor of this model. Activate one with model.set_adapter(name)."
        )
    return found


def check_trained(model: Any) -> None:
    """Refuse trained parameters that are not in memory or not finite.

    Raises:
        UnsupportedModelError: When one is offloaded.
        ExportError: When one is not finite.
    """
    for name, parameter in model.named_parameters():
        is_adapters = ".lora_" in name or ".modules_to_save." in name
        # Biases and other parameters of the base that trained with it.
        if not is_adapters and not parameter.requires_grad:
            continue
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name} {_OFFLOADED}")
        if not parameter.isfinite().all():
            raise ExportError(
                f"{name} holds numbers that are not finite; training has diverged. Train with a "
                "lower learning rate, or export an earlier checkpoint."
            )


def drop_tied_copies(
    tensors: dict[str, LiveTensor], tied: Collection[str]
) -> dict[str, LiveTensor]:
    """The tensors without those that loading makes again from another one.

    Two names that share the base weight but not the adapter (a LoRA on the embedding of a
    model whose head is tied to it) are different tensors and both stay. So do layers that share
    their weights in memory only, as peft's ``layer_replication`` makes them.

    Args:
        tensors: All of a model's, by name.
        tied: Names that transformers ties to others in this architecture.
    """
    first: dict[tuple[int, int | None], LiveTensor] = {}
    for tensor in tensors.values():
        if tensor.name not in tied:
            first.setdefault(tensor.identity, tensor)
    for tensor in tensors.values():
        first.setdefault(tensor.identity, tensor)
    kept = {tensor.name for tensor in first.values()}
    return {name: tensor for name, tensor in tensors.items() if name in kept or name not in tied}


def check_adapters(model: Any) -> None:
    """Refuse a ``PeftModel`` whose adapters are not at work, or of a kind that cannot be merged.

    Raises:
        UnsupportedModelError: Says what to call first.
    """
    if not model.active_adapters:
        raise UnsupportedModelError(
            "No adapter of this model is active: it was deleted, or none was chosen. Activate one "
            "with model.model.set_adapter(name), or load a saved adapter again."
        )
    for name in model.active_adapters:
        config = model.peft_config[name]
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise UnsupportedModelError(
                f"Adapter {name!r} is a {config.peft_type} adapter; only LoRA and its variants "
                "rsLoRA, DoRA, PiSSA and LoftQ can be merged."
            )
    try:
        status = model.get_model_status()
    except ValueError as error:  # what peft says where it finds no adapter layers
        raise UnsupportedModelError(
            "The adapter was taken out of this model in memory, by unload() or merge_and_unload(). "
            "Load a saved adapter again; exports need no merging beforehand."
        ) from error
    if status.enabled is not True:
        raise UnsupportedModelError(
            "The adapters of this model are switched off, in whole or in part, so an export would "
            "leave them out. Call model.enable_adapter_layers() first."
        )
    if status.merged_adapters:
        raise UnsupportedModelError(
            f"The adapters {status.merged_adapters} are already merged into the base weights in "
            "memory, which would merge them twice. Call model.unmerge_adapter() first."
        )


def _walk(module: Any, path: str, *, is_replaced: bool = False) -> Iterator[LiveTensor]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import (
        AuxiliaryTrainingWrapper,
        ModulesToSaveWrapper,
        TrainableTokensWrapper,
    )

    if isinstance(module, TrainableTokensWrapper):
        yield from _walk_tokens(module.token_adapter, path)
        return
    wrappers: dict[str, Any] = {}
    while isinstance(module, ParamWrapper):
        wrappers[module.parameter_name] = module
        module = module.base_layer
    if isinstance(module, LoraLayer):
        yield from _walk_lora(module, path)
        return
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        if active:
            yield from _walk(module.modules_to_save[active[0]], path, is_replaced=True)
        else:
            yield from _walk(module.original_module, path)
        return
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise UnsupportedModelError(
            f"{path} is wrapped in peft's {type(module).__name__}, which cannot be merged. "
            f"{_KEEP_IT}"
        )
    prefix = f"{path}." if path else ""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            layer = wrappers.get(key)
            adapters = () if layer is None else _find_active(layer)
            yield _checked(
                LiveTensor(prefix + key, module, key, layer, adapters, is_replaced=is_replaced)
            )
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield _checked(LiveTensor(prefix + key, module, key, is_replaced=is_replaced))
    for name, child in module.named_children():
        yield from _walk(child, prefix + name, is_replaced=is_replaced)


def _find_active(layer: Any) -> tuple[str, ...]:
    holder = layer.lora_embedding_A or layer.lora_A
    return tuple(name for name in layer.active_adapters if name in holder)


def _walk_tokens(layer: Any, path: str) -> Iterator[LiveTensor]:
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]
    if hasattr(base, "base_layer"):
        raise UnsupportedModelError(
            f"{path} has an adapter and tokens that were trained alone, which cannot be merged "
            f"together. {_KEEP_IT}"
        )
    for key, parameter in base._parameters.items():
        if parameter is not None:
            rows = layer if active and key == "weight" else None
            yield _checked(LiveTensor(f"{path}.{key}", base, key, tokens=rows))


def _walk_lora(layer: Any, path: str) -> Iterator[LiveTensor]:
    import torch
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D

    base = layer.base_layer
    # The last two exist only where bitsandbytes is installed.
    kinds = [
        getattr(lora, name, None) for name in ("Linear", "Embedding", "Linear4bit", "Linear8bitLt")
    ]
    if type(layer) not in kinds or not isinstance(
        base, torch.nn.Linear | torch.nn.Embedding | Conv1D
    ):
        raise UnsupportedModelError(
            f"{path} is a {type(layer).__name__} over a {type(base).__name__}; adapters can be "
            f"merged into linear and embedding layers. {_KEEP_IT}"
        )
    active = _find_active(layer)
    _check_variants(layer, active, path)
    for key, parameter in base._parameters.items():
        if parameter is None:
            continue
        adapters = active if key == "weight" else ()
        if key == "bias":
            adapters = tuple(name for name in active if layer.lora_bias.get(name))
        yield _checked(LiveTensor(f"{path}.{key}", base, key, layer, adapters))
    if base._parameters.get("bias") is None and any(layer.lora_bias.get(n) for n in active):
        raise UnsupportedModelError(
            f"The adapter adds a bias to {path}, which has none in this architecture, so there is "
            f"nothing to merge it into. {_KEEP_IT}"
        )


def _check_variants(layer: Any, active: tuple[str, ...], path: str) -> None:
    for name in active:
        variant = layer.lora_variant.get(name)
        kind = type(variant).__name__
        if variant is not None and kind not in ("DoraLinearVariant", "DoraEmbeddingVariant"):
            raise UnsupportedModelError(
                f"{path}: adapter {name!r} uses peft's {kind}, which "
                f"{_REASONS.get(kind, 'cannot be merged here')}. {_KEEP_IT}"
            )
        if variant is not None and len(active) > 1:
            raise UnsupportedModelError(
                f"{path}: {len(active)} adapters are active and {name!r} is a DoRA adapter; their "
                "sum has no single merged weight. Activate one with model.set_adapter(name)."
            )


def _checked(tensor: LiveTensor) -> LiveTensor:
    if is_absent(tensor.tensor):
        raise UnsupportedModelError(
            f"{tensor.name} is on another rank: the base was loaded in shards, or a training that "
            "shards it did not come to its end. Load with shard=False to export."
        )
    if tensor.tensor.device.type == "meta":
        raise UnsupportedModelError(f"{tensor.name} {_OFFLOADED}")
    return tensor
