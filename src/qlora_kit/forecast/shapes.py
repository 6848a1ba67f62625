"""What a model is made of, from its configuration: no weight is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from qlora_kit.config import (
    ATTENTION_ALIASES,
    DEFAULT_TARGET_MODULES,
    MLP_ALIASES,
    AdapterConfig,
)
from qlora_kit.engines.native.layers.architectures import find_architecture_obstacle
from qlora_kit.engines.native.layers.families import FAMILIES
from qlora_kit.engines.target_parameters import EXPERTS, find_parameters

__all__ = ["ModelShape", "read_shape"]

#: Bytes a number of NF4 takes with its scales: one byte for 64, whose own scales are shared by 256.
_NF4_BYTES: Final = 0.5 + (1 + 4 / 256) / 64


@dataclass(frozen=True)
class Linear:
    """A linear layer: its name, inputs and outputs."""

    name: str
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        """Its weights."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Stack:
    """A parameter outside of linear layers that can take an adapter: experts, or one matrix."""

    name: str
    shape: tuple[int, ...]

    def count_adapter(self, rank: int) -> int:
        """Numbers of an adapter of this rank."""
        *experts, rows, columns = self.shape
        return math.prod(experts) * rank * (rows + columns)


@dataclass(frozen=True)
class ModelShape:
    """What a model is made of.

    Attributes:
        linears: Its linear layers but the language-model head.
        stacks: Parameters that ``target_parameters`` may name.
        other_parameters: Everything else, the head included where it is not the embedding.
        layers: Number of decoder layers.
        hidden: Width of a token's state.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        intermediate: Width within the MLP; of all experts that a token goes to.
        vocabulary: Tokens that the head scores.
        obstacle: Why the native engine's own step does not compute the model, or ``None``.
        post_norms: Norms of a layer's outputs.
        routed: Experts that a token goes to; 0 for none.
        capped_heads: Attention heads whose scores are soft-capped.
    """

    linears: tuple[Linear, ...]
    stacks: tuple[Stack, ...]
    other_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    obstacle: str | None
    post_norms: int = 0
    routed: int = 0
    capped_heads: int = 0

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.other_parameters + sum(linear.size for linear in self.linears)

    def count_weights(self, quantization: str | None, item_bytes: int, shards: int = 1) -> int:
        """Bytes of the loaded base.

        Args:
            quantization: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``None``.
            item_bytes: Bytes of a number that is not quantized.
            shards: Over how many ranks its layers are spread; two more come and go then.
        """
        in_linears = sum(linear.size for linear in self.linears)
        rate = {"nf4": _NF4_BYTES, "fp4": _NF4_BYTES, "int8": 1.0}.get(
            quantization or "", float(item_bytes)
        )
        rest = self.other_parameters * item_bytes
        if shards == 1:
            return int(in_linears * rate) + rest
        # The scales that are sent are those that are computed with, in float32.
        sent = rate if quantization is None else rate + 4 / 64
        layer = in_linears / self.layers
        return int(layer * (-(-self.layers // shards) * rate + 2 * sent)) + rest

    def find_adapted(self, adapter: AdapterConfig) -> list[Linear]:
        """The linear layers that get an adapter."""
        targets = adapter.target_modules
        names: Sequence[str] | None = (targets,) if isinstance(targets, str) else targets
        is_default = targets is DEFAULT_TARGET_MODULES and not adapter.target_parameters
        has = {linear.name.split(".")[-1] for linear in self.linears}
        if targets == "all-linear" or (
            # As attach_lora does where a model has other projections than Llama's.
            is_default and not has >= set(targets)
        ):
            names = None
        elif targets in ("attention", "mlp"):
            names = ATTENTION_ALIASES if targets == "attention" else MLP_ALIASES
        chosen = adapter.layers_to_transform
        layers = None if chosen is None else {chosen} if isinstance(chosen, int) else set(chosen)
        return [
            linear
            for linear in self.linears
            if (names is None or any(f".{linear.name}".endswith(f".{name}") for name in names))
            and (layers is None or any(f".{layer}." in linear.name for layer in layers))
        ]

    def find_adapted_stacks(self, adapter: AdapterConfig) -> list[Stack]:
        """The parameters that get an adapter of their own."""
        asked = adapter.target_parameters or ()
        names = (asked,) if isinstance(asked, str) else asked
        return [
            stack
            for stack in self.stacks
            if (EXPERTS in names and len(stack.shape) == 3 and "expert" in stack.name)
            or any(f".{stack.name}".endswith(f".{name}") for name in names)
        ]

    def count_adapter(self, adapter: AdapterConfig) -> int:
        """Parameters that train: adapters, and modules that are trained in full."""
        ranks = adapter.rank_pattern or {}
        count = sum(
            (linear.inputs + linear.outputs) * ranks.get(linear.name.split(".")[-1], adapter.r)
            for linear in self.find_adapted(adapter)
        )
        count += sum(
            stack.count_adapter(ranks.get(stack.name.split(".")[-1], adapter.r))
            for stack in self.find_adapted_stacks(adapter)
        )
        whole = set(adapter.modules_to_save or ())
        heads = {"lm_head", "embed_tokens"} & whole
        count += len(heads) * self.vocabulary * self.hidden
        return count + sum(
            linear.size for linear in self.linears if linear.name.split(".")[-1] in whole
        )

    @property
    def dequantized(self) -> int:
        """Weights of all linear layers, in numbers."""
        return sum(linear.size for linear in self.linears)

    @property
    def largest_group(self) -> int:
        """Weights of the largest group that is multiplied at once, in numbers."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (queries + 2 * keys)
        # Experts stay in 16 bits, as transformers holds them.
        return attention if self.routed else max(attention, 2 * self.hidden * self.intermediate)


def read_shape(model_config: Any) -> ModelShape:
    """The shape of the causal language model that a configuration describes.

    Args:
        model_config: A transformers configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = model_config.get_text_config()
    with torch.device("meta"):
        # It is written to while a model is built of it.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
    head = model.get_output_embeddings()
    linears = tuple(
        Linear(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    stacks = tuple(Stack(name, tuple(one.shape)) for name, one in find_parameters(model).items())
    counted = sum(linear.size for linear in linears)
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = int(text.num_attention_heads)
    family = FAMILIES.get(text.model_type)
    routed = int(getattr(text, "num_experts_per_tok", None) or 0)
    intermediate = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    if routed:
        intermediate = routed * int(getattr(text, "moe_intermediate_size", None) or intermediate)
    return ModelShape(
        linears=linears,
        stacks=stacks,
        other_parameters=total - counted,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=intermediate,
        routed=routed,
        vocabulary=int(head.weight.shape[0] if head is not None else text.vocab_size),
        obstacle=find_architecture_obstacle(model_config.to_dict()),
        post_norms=0 if family is None else family.post_norms,
        capped_heads=heads if family is not None and family.caps_attention else 0,
    )
