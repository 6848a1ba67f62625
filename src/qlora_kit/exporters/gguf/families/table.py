"""The table of model families: how each differs between transformers and llama.cpp.

To add a family, write one :class:`Family` and pass it to :func:`register_family`; a package of
your own can do so from its ``qlora_kit`` plugin module, see ``docs/gguf.md``. Tensor names
come from the ``gguf`` package's maps, so a family states only what is particular to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qlora_kit.errors import PluginError, UnsupportedModelError
from qlora_kit.exporters.gguf.families.dense import DENSE
from qlora_kit.exporters.gguf.families.experts import EXPERTS
from qlora_kit.exporters.gguf.families.family import Config, Description, Family
from qlora_kit.exporters.gguf.families.gemmas import GEMMAS
from qlora_kit.exporters.gguf.families.mamba import MAMBA
from qlora_kit.exporters.gguf.families.recurrent import RECURRENT
from qlora_kit.exporters.gguf.families.rope import read_rope
from qlora_kit.exporters.gguf.families.routed import ROUTED
from qlora_kit.exporters.gguf.families.transforms import NORMS_PLUS_ONE, ROTARY
from qlora_kit.exporters.gguf.families.windows import check_windows, note_sliding_window

__all__ = [
    "FAMILIES",
    "Config",
    "Description",
    "Family",
    "find_family",
    "read_family",
    "register_family",
]


def _describe_gemma2(config: Config, description: Description) -> None:
    layers = config.layers
    # Not a key of the file: src/models/gemma2.cpp lets every second layer attend to everything,
    # and takes the 27B model, whose attention is scaled otherwise, by its 46 layers.
    check_windows(config, [bool((i + 1) % 2) for i in range(layers)])
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
    check_windows(config, [bool((i + 1) % period) for i in range(config.layers)])
    return period


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
    note_sliding_window(config, description)


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
    note_sliding_window(config, description)


_ATTENTION_BIASES: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
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
        transforms=ROTARY,
        rotary_kinds=("linear", "llama3", "yarn"),
        biases=(*_ATTENTION_BIASES, "gate_proj", "up_proj", "down_proj"),
    ),
    Family(
        "mistral",
        "llama",
        transforms=ROTARY,
        rotary_kinds=("linear", "llama3", "yarn"),
        describe=note_sliding_window,
    ),
    Family(
        "qwen2",
        "qwen2",
        biases=("q_proj", "k_proj", "v_proj"),
        rotary_kinds=("linear", "yarn"),
        describe=note_sliding_window,
    ),
    Family("qwen3", "qwen3", rotary_kinds=("linear", "yarn"), describe=note_sliding_window),
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
        transforms=NORMS_PLUS_ONE,
        describe=_describe_gemma2,
    ),
    Family(
        "gemma3_text",
        "gemma3",
        activation="gelu_pytorch_tanh",
        ties_by_default=True,
        transforms=NORMS_PLUS_ONE,
        describe=_describe_gemma3,
        rotary_kinds=("linear",),
        rotary_layer_type="full_attention",
        default_theta=1_000_000.0,
    ),
    Family("phi3", "phi3", rotary_kinds=("longrope",), describe=_describe_phi3),
    *DENSE,
    *EXPERTS,
    *GEMMAS,
    *MAMBA,
    *RECURRENT,
    *ROUTED,
):
    register_family(_family)


def read_family(config: Mapping[str, Any]) -> tuple[Family, Config]:
    """The family of a configuration, and the configuration of its text model.

    A model that also sees or hears wraps a text model; that one is what a file holds.

    Raises:
        UnsupportedModelError: When the table has no such family; names those it has.
    """
    inner = config.get("text_config")
    kind = config.get("model_type")
    if kind not in FAMILIES and isinstance(inner, Mapping):
        # What the wrapper says of the head is what counts; an export may have untied it.
        own = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = {**inner, **own}
    family, values = find_family(config), Config(config)
    return family if family.choose is None else family.choose(family, values), values


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a text model's configuration.

    Raises:
        UnsupportedModelError: When the table has no such family; names those it has.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF export does not know models of type {kind!r}. Known: "
            f"{', '.join(sorted(FAMILIES))}. Export with 'merged_16bit', or add the family with "
            "qlora_kit.exporters.gguf.register_family."
        )
    return FAMILIES[kind]
