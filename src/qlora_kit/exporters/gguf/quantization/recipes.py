"""Which type each tensor is stored in, for every quantization a user can ask for.

The choices are those of llama.cpp's ``src/llama-quant.cpp`` (MIT, the ggml authors:
``tensor_allows_quantization``, ``llama_tensor_get_type_impl`` and ``tensor_type_fallback``),
restated as rules, so that a file made here has the layout of one made by ``llama-quantize``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from qlora_kit.errors import ConfigError, did_you_mean

__all__ = ["ALIASES", "RECIPES", "ModelShape", "Recipe", "choose_types", "resolve_recipes"]


@dataclass(frozen=True)
class Recipe:
    """One quantization: what users type, and how llama.cpp numbers it.

    Attributes:
        name: What users type.
        base_type: The type of most matrices, as ``gguf.GGMLQuantizationType`` spells it.
        file_type: llama.cpp's ``general.file_type``.
        bits: Rough bits per weight, for estimates said before anything is read.
    """

    name: str
    base_type: str
    file_type: int
    bits: float

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in blocks with scales."""
        return self.base_type not in ("F32", "F16", "BF16")


RECIPES: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", "F32", 0, 32),
        Recipe("f16", "F16", 1, 16),
        Recipe("bf16", "BF16", 32, 16),
        Recipe("q8_0", "Q8_0", 7, 8.5),
        Recipe("q4_0", "Q4_0", 2, 4.7),
        Recipe("q4_1", "Q4_1", 3, 5.1),
        Recipe("q5_0", "Q5_0", 8, 5.6),
        Recipe("q5_1", "Q5_1", 9, 6.1),
        Recipe("q2_k", "Q2_K", 10, 3.4),
        Recipe("q3_k_s", "Q3_K", 11, 3.7),
        Recipe("q3_k_m", "Q3_K", 12, 4.1),
        Recipe("q3_k_l", "Q3_K", 13, 4.4),
        Recipe("q4_k_s", "Q4_K", 14, 4.8),
        Recipe("q4_k_m", "Q4_K", 15, 5.1),
        Recipe("q5_k_s", "Q5_K", 16, 5.7),
        Recipe("q5_k_m", "Q5_K", 17, 5.9),
        Recipe("q6_k", "Q6_K", 18, 6.6),
    )
}

#: Names that llama.cpp and Unsloth users type as well.
ALIASES: Final[Mapping[str, str]] = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q8": "q8_0",
}

# What a row that does not divide into a type's blocks is stored in (tensor_type_fallback).
_FALLBACK: Final = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Never quantized: a router's few rows decide which expert runs.
_KEPT_IN_F32: Final = ("ffn_gate_inp.weight",)

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """What the rules look at besides a tensor's name and width.

    Attributes:
        architecture: ``general.architecture``.
        layers: Number of transformer blocks.
        heads: Attention heads of the first block.
        kv_heads: Key/value heads of the first block.
        experts: Experts per block, 0 for a dense model.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def heads_per_kv(self) -> int:
        """How many query heads share one key/value head."""
        return self.heads // max(1, self.kv_heads)

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model, whose attn_v is small enough to spoil."""
        if self.layers != 80:
            return False
        return self.architecture == "qwen2" or (
            self.architecture == "llama" and self.heads != self.kv_heads
        )


@dataclass
class _Context:
    recipe: str
    shape: ModelShape
    is_tied: bool
    rank: dict[str, int] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)


def resolve_recipes(asked: str | Iterable[str]) -> list[Recipe]:
    """The recipes behind what a user typed, once each, in the order asked.

    Raises:
        ConfigError: When a name is unknown or none was given.
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    if not names:
        raise ConfigError(f"quantization is empty; choose from {', '.join(RECIPES)}.")
    found: dict[str, Recipe] = {}
    for name in names:
        key = str(name).lower()
        key = ALIASES.get(key, key)
        if key not in RECIPES:
            hint = did_you_mean(key, (*RECIPES, *ALIASES))
            raise ConfigError(
                f"There is no quantization {name!r}.{hint} Known: {', '.join(RECIPES)}. "
                "The iq types need an importance matrix, which is not supported here."
            )
        found[key] = RECIPES[key]
    return list(found.values())


def choose_types(
    tensors: Sequence[tuple[str, tuple[int, ...]]], recipe: Recipe, shape: ModelShape
) -> dict[str, str]:
    """The storage type of every tensor of a file.

    Args:
        tensors: GGUF names with their shapes, rows first (the last entry is a row's length).
        recipe: The quantization asked for.
        shape: The model's dimensions.

    Returns:
        Type names as ``gguf.GGMLQuantizationType`` spells them, by tensor name.
    """
    names = {name for name, _ in tensors}
    context = _Context(recipe.name, shape, is_tied="output.weight" not in names)
    _number_layers(names, context)
    return {name: _choose(name, dims, recipe, context) for name, dims in tensors}


def _number_layers(names: Iterable[str], context: _Context) -> None:
    """Count the value and down projections in layer order, as llama.cpp's quantizer does."""
    for category in ("attn_v", "ffn_down"):
        members = sorted(
            (name for name in names if _category(name) == category),
            key=lambda name: (_layer_of(name), name),
        )
        context.count[category] = len(members)
        for position, name in enumerate(members):
            # With experts the layer itself counts, not the position among the tensors.
            uses_layer = category == "ffn_down" and context.shape.experts > 1
            context.rank[name] = _layer_of(name) if uses_layer else position


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match.group(1)) if match else 0


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "token_embd"
    # A fused qkv matrix holds the values, so it is treated like them.
    if "attn_v.weight" in name or "attn_qkv.weight" in name:
        return "attn_v"
    for category in ("attn_k", "attn_q", "attn_output"):
        if f"{category}.weight" in name:
            return category
    return "ffn_down" if "ffn_down" in name else "other"


def _choose(name: str, dims: tuple[int, ...], recipe: Recipe, context: _Context) -> str:
    if len(dims) < 2 or not name.endswith(".weight") or "_norm.weight" in name:
        return "F32"
    if any(kept in name for kept in _KEPT_IN_F32):
        return "F32"
    if not recipe.is_quantized:
        return recipe.base_type
    # The order is llama_tensor_get_type_impl's: the first category that fits decides, and only
    # then is the width looked at (tensor_type_fallback), so that a fallback is never improved on.
    category = _category(name)
    columns = dims[-1]
    chosen = recipe.base_type
    if category == "output" or (category == "token_embd" and context.is_tied):
        if columns % _block_size(chosen) != 0:
            chosen = "Q8_0"
        elif chosen != "Q8_0":
            chosen = "Q6_K"
    elif category == "attn_v":
        chosen = _choose_attention_value(name, chosen, context)
    elif category == "ffn_down":
        chosen = _choose_ffn_down(name, chosen, context)
    elif category == "attn_output":
        chosen = _choose_attention_output(chosen, context)
    elif category == "attn_k" and context.shape.experts == 8:
        chosen = "Q8_0"
    return _fit(chosen, columns)


def _uses_more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    # use_more_bits of llama-quant.cpp, integer divisions and all.
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _choose_attention_value(name: str, chosen: str, context: _Context) -> str:
    index, count = context.rank[name], context.count["attn_v"]
    match context.recipe:
        case "q2_k":
            chosen = "Q4_K" if context.shape.heads_per_kv >= 4 else "Q3_K"
        case "q3_k_m":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        case "q3_k_l":
            chosen = "Q5_K"
        case "q4_k_m" | "q5_k_m" if _uses_more_bits(index, count):
            chosen = "Q6_K"
        case "q4_k_s" if index < 4:
            chosen = "Q5_K"
    if context.shape.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if context.shape.experts == 8 else chosen


def _choose_ffn_down(name: str, chosen: str, context: _Context) -> str:
    index = context.rank[name]
    count = context.count["ffn_down"]
    match context.recipe:
        case "q2_k":
            return "Q3_K"
        case "q3_k_m":
            return "Q5_K" if index < count // 16 else "Q4_K"
        case "q3_k_l":
            return "Q5_K"
        case "q4_k_m" | "q5_k_m" if _uses_more_bits(index, count):
            return "Q6_K"
        case "q4_k_s" if index < count // 8:
            return "Q5_K"
    return chosen


def _choose_attention_output(chosen: str, context: _Context) -> str:
    if context.shape.experts == 8:
        favoured = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
        return "Q5_K" if context.recipe in favoured else chosen
    return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(context.recipe, chosen)


def _block_size(type_name: str) -> int:
    # QK_K and QK4_0 ... QK8_0 of ggml-common.h, in numbers.
    return 256 if type_name.endswith("_K") else 32 if type_name.startswith("Q") else 1


def _fit(type_name: str, columns: int) -> str:
    if columns % _block_size(type_name) == 0:
        return type_name
    fallback = _FALLBACK.get(type_name, "F16")
    return fallback if columns % _block_size(fallback) == 0 else "F16"
