"""Which type each tensor is stored in, for every quantization a user can ask for.

The choices are those of llama.cpp's ``src/llama-quant.cpp`` (MIT, the ggml authors:
``tensor_allows_quantization``, ``llama_tensor_get_type_impl`` and ``tensor_type_fallback``),
restated as rules, so that a file made here has the layout of one made by ``llama-quantize``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from qlora_kit.exporters.gguf.quantization.recipes import BLOCK_SIZES, Recipe
from qlora_kit.exporters.gguf.quantization.type_requests import TypeRequests

__all__ = ["ModelShape", "allows_quantization", "choose_types", "find_unweighted"]

# What a row that does not divide into a type's blocks is stored in (tensor_type_fallback).
_FALLBACK: Final = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Never quantized: a router's few rows decide which expert runs, convolutions are tiny.
_KEPT_IN_F32: Final = (
    "ffn_gate_inp.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
)

#: What ``llama-quantize`` refuses to store a matrix in without knowing what matters in it.
_NEEDS_IMPORTANCE: Final = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
# What ggml's quantizer cannot do at all without (ggml_quantize_requires_imatrix).
_CANNOT_WITHOUT: Final = ("IQ2_XXS", "IQ2_XS", "IQ1_S")

_BELOW_3_BITS: Final = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")

_LAYER = re.compile(r"blk\.(\d+)\.")
_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")

# Layers of the model that llama.cpp takes for a 70B one, by architecture.
_LAYERS_OF_70B: Final = {"llama": 80, "qwen2": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class ModelShape:
    """What the rules look at besides a tensor's name and width.

    Attributes:
        architecture: ``general.architecture``.
        layers: Number of transformer blocks.
        heads: Attention heads of the first block.
        kv_heads: Key/value heads of the first block, 0 where that one has no attention.
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
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model, whose attn_v is small enough to spoil."""
        if self.layers != _LAYERS_OF_70B.get(self.architecture):
            return False
        if self.architecture != "llama":
            return True
        return self.heads != self.kv_heads and self.experts != 8


@dataclass
class _State:
    """What has been decided so far: some rules count the tensors of a kind."""

    recipe: str
    shape: ModelShape
    is_tied: bool
    has_importance: bool
    values: int
    seen: Counter[str] = field(default_factory=Counter)

    def place(self, category: str, name: str) -> int:
        """How manieth of its kind a tensor is; with experts its layer counts instead."""
        position = self.seen[category]
        self.seen[category] += 1
        return _layer_of(name) if self.shape.experts > 1 else position

    def is_early(self, index: int, share: int = 8) -> bool:
        """Whether a layer is in the first eighth of them."""
        return index < self.shape.layers // share


def choose_types(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    recipe: Recipe,
    shape: ModelShape,
    *,
    has_importance: bool = False,
    requests: TypeRequests | None = None,
) -> dict[str, str]:
    """The storage type of every tensor of a file.

    Args:
        tensors: GGUF names with their shapes, rows first (the last entry is a row's length).
        recipe: The quantization asked for.
        shape: The model's dimensions.
        has_importance: Whether an importance matrix guides the quantizer; some choices differ.
        requests: Types that the user asked for by name.

    Returns:
        Type names as ``gguf.GGMLQuantizationType`` spells them, by tensor name.
    """
    asked = (requests or TypeRequests()).over(recipe)
    names = [name for name, _ in tensors]
    state = _State(
        recipe.name,
        shape,
        is_tied="output.weight" not in names,
        has_importance=has_importance,
        values=sum(_category(name) == "attn_v" for name in names),
    )
    dims = dict(tensors)
    # llama_model_loader's weight_name_comparer: what has no layer first, then by name.
    order = sorted(names, key=lambda name: (_layer_of(name), name))
    chosen = {name: _choose(name, dims[name], recipe, asked, state) for name in order}
    return {name: chosen[name] for name in names}


def find_unweighted(
    types: dict[str, str], recipe: Recipe, weighted: Iterable[str]
) -> list[tuple[str, str]]:
    """Tensors whose type is of no use without an importance that nothing gives, with that type.

    ``tensor_requires_imatrix`` of llama-quant.cpp, and what would end ggml's process.

    Args:
        types: What :func:`choose_types` returned.
        recipe: The quantization asked for.
        weighted: Names of tensors whose importance is known.
    """
    known = set(weighted)
    found = []
    for name, type_name in types.items():
        is_table = name == "output.weight" or name in _EMBEDDINGS
        needed = type_name in (_CANNOT_WITHOUT if is_table else _NEEDS_IMPORTANCE)
        if not is_table and type_name == "Q2_K" and recipe.name == "q2_k_s":
            needed = True
        if needed and name not in known:
            found.append((name, type_name))
    return found


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match.group(1)) if match else -1


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "token_embd"
    # A matrix that holds the values among others is treated like them.
    if any(f"{part}.weight" in name for part in ("attn_qkv", "attn_kv_b", "attn_v")):
        return "attn_v"
    for category in ("attn_k", "attn_q", "attn_output"):
        if f"{category}.weight" in name:
            return category
    return next((part for part in ("ffn_up", "ffn_gate", "ffn_down") if part in name), "other")


def allows_quantization(name: str, dims: tuple[int, ...]) -> bool:
    """Whether llama.cpp would quantize a tensor at all."""
    # ggml's number of dimensions: a matrix of one row is a vector.
    if (
        len(dims) < 2
        or max(dims[:-1]) < 2
        or not name.endswith(".weight")
        or "_norm.weight" in name
    ):
        return False
    return not any(kept in name for kept in _KEPT_IN_F32)


def _choose(
    name: str, dims: tuple[int, ...], recipe: Recipe, asked: TypeRequests, state: _State
) -> str:
    if not allows_quantization(name, dims):
        return "F32"
    category = _category(name)
    # per_layer_token_embd, a large table of its own, can also be asked for by its name.
    is_named = name != "token_embd.weight" and asked.find(name) is not None
    if asked.embeddings and category == "token_embd" and not is_named:
        return asked.embeddings
    if asked.output and category == "output":
        return asked.output
    if not recipe.is_quantized:
        return recipe.base_type
    chosen = asked.find(name)
    if chosen is None:
        chosen = _choose_from_mixture(name, dims, category, recipe.base_type, asked, state)
    return _fit(chosen, dims[-1])


def _choose_from_mixture(
    name: str,
    dims: tuple[int, ...],
    category: str,
    chosen: str,
    asked: TypeRequests,
    state: _State,
) -> str:
    # The order is llama_tensor_get_type_impl's: the first category that fits decides, and only
    # then is the width looked at (tensor_type_fallback), so that a fallback is never improved on.
    recipe = state.recipe
    if category == "output" or (category == "token_embd" and state.is_tied):
        return asked.output or _choose_output(chosen, dims[-1], recipe)
    if recipe == "mxfp4_moe":
        return "MXFP4" if len(dims) > 2 and dims[0] > 1 else "Q8_0"
    if category == "token_embd":
        return _choose_embeddings(chosen, recipe)
    if recipe in _BELOW_3_BITS:
        return _choose_below_3_bits(category, chosen, state)
    match category:
        case "attn_v":
            return _choose_attention_value(chosen, state)
        case "attn_k" if state.shape.experts == 8:
            return "Q8_0"
        case "attn_k" | "attn_q":
            return {"iq3_xs": "IQ3_XXS", "iq3_xxs": "IQ2_S"}.get(recipe, chosen)
        case "ffn_down":
            return _choose_ffn_down(state.place(category, name), chosen, state)
        case "attn_output":
            return _choose_attention_output(chosen, state)
        case "ffn_gate" | "ffn_up":
            index, layers = state.place(category, name), state.shape.layers
            is_inner = layers // 8 <= index < 7 * layers // 8
            return "IQ3_XXS" if recipe == "iq3_xs" and is_inner else chosen
    return chosen


def _choose_output(chosen: str, columns: int, recipe: str) -> str:
    if recipe == "mxfp4_moe" or columns % BLOCK_SIZES[chosen] != 0:
        return "Q8_0"
    if recipe in _BELOW_3_BITS or recipe == "iq3_xxs":
        return "Q5_K"
    return chosen if chosen == "Q8_0" else "Q6_K"


def _choose_embeddings(chosen: str, recipe: str) -> str:
    if recipe in ("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"):
        return "Q2_K"
    if recipe in ("iq2_s", "iq2_m", "iq3_xxs"):
        return "IQ3_S"
    return "Q4_K" if recipe in ("tq1_0", "tq2_0") else chosen


def _choose_below_3_bits(category: str, chosen: str, state: _State) -> str:
    is_larger = state.recipe in ("iq2_s", "iq2_m")
    match category:
        case "attn_v":
            if state.shape.heads_per_kv >= 4 or state.shape.experts >= 4:
                return "Q4_K"
            return "IQ3_S" if is_larger else "Q2_K"
        case "attn_k" if state.shape.experts == 8:
            return "Q4_K"
        case "ffn_down":
            # Counted here, whatever the experts.
            state.seen[category] += 1
            if state.is_early(state.seen[category] - 1):
                return "IQ3_S" if is_larger else "Q2_K"
        case "attn_output":
            if state.shape.experts == 8:
                return "Q5_K"
            if state.recipe in ("iq1_s", "iq1_m"):
                return "IQ2_XXS"
            return "IQ3_S" if is_larger else chosen
    return chosen


def _uses_more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    # use_more_bits of llama-quant.cpp, integer divisions and all.
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _choose_attention_value(chosen: str, state: _State) -> str:
    index, shares = state.seen["attn_v"], state.shape.heads_per_kv >= 4
    state.seen["attn_v"] += 1
    match state.recipe:
        case "q2_k" | "q2_k_l":
            chosen = "Q4_K" if shares else "Q3_K"
        case "q2_k_s" | "iq3_xs" | "iq3_s" if shares:
            chosen = "Q4_K"
        case "iq3_xxs":
            chosen = "Q4_K" if shares else "IQ3_XXS" if state.has_importance else "IQ3_S"
        case "iq3_m":
            chosen = "Q4_K"
        case "q3_k_m":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        case "q3_k_l":
            chosen = "Q5_K"
        case "iq4_nl" | "iq4_xs" if shares:
            chosen = "Q5_K"
        case "q4_k_m" | "q5_k_m" if _uses_more_bits(index, state.values):
            chosen = "Q6_K"
        case "q4_k_s" if index < 4:
            chosen = "Q5_K"
    if state.shape.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if state.shape.experts == 8 else chosen


def _choose_ffn_down(index: int, chosen: str, state: _State) -> str:
    layers, is_early = state.shape.layers, state.is_early(index)
    match state.recipe:
        case "q2_k" | "q2_k_l":
            return "Q3_K"
        case "q2_k_s" if is_early:
            return "Q4_K"
        case "iq3_xxs" if not state.has_importance:
            return "Q4_K" if is_early else "Q3_K"
        case "q3_k_m":
            return "Q5_K" if state.is_early(index, 16) else "Q4_K"
        case "iq3_m" if is_early or (state.shape.experts == 8 and _uses_more_bits(index, layers)):
            return "Q4_K"
        case "q3_k_l":
            return "Q5_K"
        case "q4_k_m" | "q5_k_m" if _uses_more_bits(index, layers):
            return "Q6_K"
        case "iq4_nl" | "iq4_xs" if is_early and not state.has_importance:
            return "Q5_K"
        case "q4_k_s" if is_early:
            return "Q5_K"
        # With an importance, these two go wrong in the first layers (llama-quant.cpp).
        case "q4_0" | "q5_0" if is_early and state.has_importance:
            return "Q4_1" if state.recipe == "q4_0" else "Q5_1"
    return chosen


def _choose_attention_output(chosen: str, state: _State) -> str:
    if state.shape.experts == 8:
        favoured = (
            "q2_k", "q2_k_l", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m",
            "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs",
        )  # fmt: skip
        return "Q5_K" if state.recipe in favoured else chosen
    better = {"q2_k": "Q3_K", "q2_k_l": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
    better |= {"iq3_xxs": "IQ3_S", "iq3_m": "Q4_K"}
    return better.get(state.recipe, chosen)


def _fit(type_name: str, columns: int) -> str:
    if columns % BLOCK_SIZES[type_name] == 0:
        return type_name
    fallback = _FALLBACK.get(type_name, type_name)
    return fallback if columns % BLOCK_SIZES[fallback] == 0 else "F16"
