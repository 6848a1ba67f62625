"""The table of model families: how each differs between transformers and llama.cpp.

To add a family, write one :class:`Family` and pass it to :func:`register_family`; a package of
your own can do so from its ``qlora_kit`` plugin module, see ``docs/gguf.md``. Tensor names
come from the ``gguf`` package's maps, so a family states only what is particular to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import PluginError, UnsupportedModelError
from qlora_kit.exporters.gguf.families.family import Config, Description, Family, Transform
from qlora_kit.exporters.gguf.families.rope import read_rope

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "Config", "Description", "Family", "find_family", "register_family"]


def unpermute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the two halves that transformers rotates against each other.

    Meta's checkpoints and llama.cpp pair neighbouring dimensions; transformers pairs a
    dimension with the one half a head away.

    Args:
        weight: Shape (heads * head_dim, ...).
        heads: Number of heads in it.
    """
    # transformers (H, 2, D/2, ...): dimension i turns with i + D/2. llama.cpp's "norm" rotation
    # (ggml-cpu/ops.cpp) turns 2i with 2i + 1, so the two axes change places: (H, D/2, 2, ...).
    # The same permutation on q and k leaves their products, hence attention, as they were; v has
    # no positions and stays. conversion/llama.py calls it permute().
    rest = weight.shape[1:]
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest)
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _permute_query(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return unpermute_rotary(weight, config.heads)


def _permute_key(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return unpermute_rotary(weight, config.kv_heads)


def _add_one(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Gemma stores its norms around zero."""
    # Gemma's layer multiplies by 1 + w, ggml's rms_norm by w. In float32, as norms are written:
    # in bfloat16 the sum would lose what is below 2**-8 (conversion/gemma.py, norm_shift()).
    return weight.float() + 1.0


def _note_sliding_window(config: Config, description: Description) -> None:
    """llama.cpp attends to everything in families whose window it does not implement."""
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True)
    if window is not None and is_used and window < description.metadata["context_length"]:
        description.notes.append(
            f"The model attends to the last {window} tokens only; llama.cpp attends to all, so "
            "longer contexts can differ."
        )


def _describe_gemma2(config: Config, description: Description) -> None:
    layers = config.layers
    # Not a key of the file: src/models/gemma2.cpp lets every second layer attend to everything,
    # and takes the 27B model, whose attention is scaled otherwise, by its 46 layers.
    _check_windows(config, [bool((i + 1) % 2) for i in range(layers)])
    _check_query_scale(config, is_27b=layers == 46)
    description.metadata |= {
        "attention.sliding_window": int(config.require("sliding_window")),
        "attn_logit_softcapping": float(config.require("attn_logit_softcapping")),
        "final_logit_softcapping": float(config.require("final_logit_softcapping")),
    }


def _describe_gemma3(config: Config, description: Description) -> None:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("This gemma3 model attends both ways: it is an encoder.")
    if config.get("attn_logit_softcapping") is not None:
        raise UnsupportedModelError("llama.cpp does not cap the attention logits of gemma3.")
    period = _sliding_period(config)
    # 62 layers are the 27B model to src/models/gemma3.cpp.
    _check_query_scale(config, is_27b=config.layers == 62)
    local = read_rope(config.values, "sliding_attention")
    is_nested = isinstance((config.get("rope_parameters") or {}).get("sliding_attention"), Mapping)
    theta = local.theta if is_nested else float(config.get("rope_local_base_freq", 10000.0))
    if is_nested and local.kind != "default":
        raise UnsupportedModelError("llama.cpp does not scale gemma3's sliding layers.")
    description.metadata |= {
        "attention.sliding_window": int(config.require("sliding_window")),
        "attention.sliding_window_pattern": period,
        "rope.freq_base_swa": theta,
    }
    if config.get("final_logit_softcapping") is not None:
        description.metadata["final_logit_softcapping"] = float(
            config.get("final_logit_softcapping")
        )


def _sliding_period(config: Config) -> int:
    """Every how many layers one attends to everything; llama.cpp knows only regular patterns."""
    types = config.get("layer_types")
    stated = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
    if types is None:
        return stated
    # llama_hparams::set_swa_pattern (llama-hparams.cpp): layer i slides unless (i + 1) is a
    # multiple of the period, so the first full layer gives it, and one beyond the last layer
    # stands for a model without any.
    period = types.index("full_attention") + 1 if "full_attention" in types else stated
    if period <= len(types) and "full_attention" not in types:
        period = len(types) + 1
    _check_windows(config, [bool((i + 1) % period) for i in range(config.layers)])
    return period


def _check_windows(config: Config, is_sliding: list[bool]) -> None:
    types = config.get("layer_types")
    if types is not None and [kind == "sliding_attention" for kind in types] != is_sliding:
        raise UnsupportedModelError(
            f"llama.cpp does not have this order of sliding and full attention: {types}."
        )


def _check_query_scale(config: Config, *, is_27b: bool) -> None:
    """llama.cpp derives the attention scale from the shape."""
    # f_attention_scale in src/models/gemma2.cpp and gemma3.cpp: 1 / sqrt(head_dim), and for 27B
    # 1 / sqrt(hidden_size / heads), which there is another number. No key of the file changes it.
    used = int(config.require("hidden_size")) // config.heads if is_27b else config.head_dim
    if config.get("query_pre_attn_scalar", used) != used:
        raise UnsupportedModelError(
            f"query_pre_attn_scalar is {config.get('query_pre_attn_scalar')}, and llama.cpp "
            f"would use {used} for a model of this shape."
        )


def _describe_phi3(config: Config, description: Description) -> None:
    # 0 tells llama.cpp that no window is in use; absent, it would assume one for some sizes.
    description.metadata["attention.sliding_window"] = int(config.get("sliding_window", 0))
    description.metadata.setdefault(
        "rope.scaling.original_context_length",
        int(config.get("original_max_position_embeddings", description.metadata["context_length"])),
    )
    _note_sliding_window(config, description)


def _describe_qwen3_moe(config: Config, description: Description) -> None:
    if not config.get("norm_topk_prob", False):
        raise UnsupportedModelError(
            "norm_topk_prob is false; llama.cpp always normalizes qwen3_moe's router weights."
        )
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UnsupportedModelError(
            "llama.cpp's qwen3moe has experts in every layer; this model has dense layers too."
        )
    description.metadata |= {
        "expert_count": int(config.get("num_experts") or config.require("num_local_experts")),
        "expert_used_count": int(config.require("num_experts_per_tok")),
        "expert_feed_forward_length": int(config.require("moe_intermediate_size")),
    }
    _note_sliding_window(config, description)


_ATTENTION_BIASES: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_ROTARY: Final[Mapping[str, Transform]] = {
    "q_proj.weight": _permute_query,
    "q_proj.bias": _permute_query,
    "k_proj.weight": _permute_key,
    "k_proj.bias": _permute_key,
}
_GEMMA: Final[Mapping[str, Transform]] = {"norm.weight": _add_one}

#: Families by ``model_type``.
FAMILIES: Final[dict[str, Family]] = {}


def register_family(family: Family) -> None:
    """Add a family to the table.

    Args:
        family: How models of one ``model_type`` are written. Registering the same one twice
            changes nothing.

    Raises:
        PluginError: When another one of that ``model_type`` is there already.
    """
    if FAMILIES.get(family.model_type) == family:
        return
    if family.model_type in FAMILIES:
        raise PluginError(f"A GGUF family for model_type {family.model_type!r} exists already.")
    FAMILIES[family.model_type] = family


for _family in (
    Family(
        "llama",
        "llama",
        transforms=_ROTARY,
        rotary_kinds=("linear", "llama3", "yarn"),
        biases=(*_ATTENTION_BIASES, "gate_proj", "up_proj", "down_proj"),
    ),
    Family(
        "mistral",
        "llama",
        transforms=_ROTARY,
        rotary_kinds=("linear", "llama3", "yarn"),
        describe=_note_sliding_window,
    ),
    Family(
        "qwen2",
        "qwen2",
        biases=("q_proj", "k_proj", "v_proj"),
        rotary_kinds=("linear", "yarn"),
        describe=_note_sliding_window,
    ),
    Family("qwen3", "qwen3", rotary_kinds=("linear", "yarn"), describe=_note_sliding_window),
    Family(
        "qwen3_moe",
        "qwen3moe",
        rotary_kinds=("linear", "yarn"),
        describe=_describe_qwen3_moe,
        has_experts=True,
    ),
    Family(
        "gemma2",
        "gemma2",
        activation="gelu_pytorch_tanh",
        ties_by_default=True,
        transforms=_GEMMA,
        describe=_describe_gemma2,
    ),
    Family(
        "gemma3_text",
        "gemma3",
        activation="gelu_pytorch_tanh",
        ties_by_default=True,
        transforms=_GEMMA,
        describe=_describe_gemma3,
        rotary_kinds=("linear",),
        rotary_layer_type="full_attention",
        default_theta=1_000_000.0,
    ),
    Family("phi3", "phi3", rotary_kinds=("longrope",), describe=_describe_phi3),
):
    register_family(_family)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration.

    Raises:
        UnsupportedModelError: When the table has no such family; names those it has.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        hint = (
            " It wraps a text model; load and export that one."
            if isinstance(config.get("text_config"), Mapping)
            else ""
        )
        raise UnsupportedModelError(
            f"GGUF export does not know models of type {kind!r}.{hint} Known: "
            f"{', '.join(sorted(FAMILIES))}. Export with 'merged_16bit', or add the family with "
            "qlora_kit.exporters.gguf.register_family."
        )
    return FAMILIES[kind]
