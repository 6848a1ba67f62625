"""Families of dense models besides those of :mod:`.table`; each says what is particular to it.

What llama.cpp reads and computes is in ``src/models/NAME.cpp``, what its converter writes in
``conversion/NAME.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.family import Config, Description, Family
from qlora_kit.exporters.gguf.families.rope import read_rope
from qlora_kit.exporters.gguf.families.transforms import (
    NORMS_PLUS_ONE,
    ROTARY,
    squeeze_convolution,
)
from qlora_kit.exporters.gguf.families.windows import (
    describe_windows,
    list_sliding,
    note_sliding_window,
)

if TYPE_CHECKING:
    from qlora_kit.weights.source import TensorSource

__all__ = ["DENSE", "check_absent", "check_heads_alike", "describe_alpha", "describe_granite"]

_QKV: Final = ("q_proj", "k_proj", "v_proj")
_LAYER_NORMS: Final = ("input_layernorm", "post_attention_layernorm", "norm")
_PHI_NORMS: Final = ("input_layernorm", "final_layernorm")

#: What Hunyuan's models with an alpha were made for, whatever their configurations say.
_HUNYUAN_CONTEXT: Final = 256 * 1024

#: What a block has that normalizes after its parts, not before.
_POST_NORMS: Final = ("attn_output", "ffn_down", "post_attention_norm", "post_ffw_norm")


def check_absent(config: Config, architecture: str, **wanted: object) -> None:
    """Refuse a model that sets what llama.cpp does not compute.

    Args:
        config: Its configuration.
        architecture: llama.cpp's name for its family.
        **wanted: Entries, and the only value that llama.cpp computes.
    """
    for key, value in wanted.items():
        stated = config.get(key, value)
        if stated != value:
            raise UnsupportedModelError(
                f"{key} is {stated!r}; llama.cpp computes {key}={value!r} for {architecture!r}. "
                "Export with 'merged_16bit' and run it with transformers or vLLM."
            )


def describe_granite(config: Config, description: Description) -> None:
    """Granite multiplies where others divide by roots."""
    description.metadata |= {
        "attention.scale": float(config.require("attention_multiplier")),
        "embedding_scale": float(config.require("embedding_multiplier")),
        "residual_scale": float(config.require("residual_multiplier")),
        "logit_scale": float(config.require("logits_scaling")),
    }


def _describe_olmo(config: Config, description: Description) -> None:
    if config.get("clip_qkv") is not None:
        description.metadata["attention.clamp_kqv"] = float(config.get("clip_qkv"))


def _check_grouped_width(config: Config, architecture: str) -> None:
    """llama.cpp takes the heads of some families to be as wide as the model altogether."""
    if config.head_dim * config.heads != int(config.require("hidden_size")):
        raise UnsupportedModelError(
            f"head_dim is {config.head_dim}; llama.cpp takes {architecture}'s heads to be "
            f"{int(config.require('hidden_size')) // config.heads} wide."
        )


def _describe_olmo2(config: Config, description: Description) -> None:
    _check_grouped_width(config, "olmo2")


def _describe_olmo3(config: Config, description: Description) -> None:
    _check_grouped_width(config, "olmo2")
    describe_windows(config, description, 4)
    # src/models/olmo2.cpp: layers that slide are never scaled.
    stated = config.get("rope_parameters") or {}
    if isinstance(stated.get("sliding_attention"), Mapping):
        local = read_rope(config.values, "sliding_attention")
        if local.kind != "default":
            raise UnsupportedModelError("llama.cpp does not scale olmo3's sliding layers.")
        description.metadata["rope.freq_base_swa"] = local.theta


def _describe_smollm3(config: Config, description: Description) -> None:
    # n_no_rope_layer_step in src/models/smollm3.cpp: every fourth layer does not rotate.
    stated = config.get("no_rope_layers")
    wanted = [int(bool((i + 1) % 4)) for i in range(config.layers)]
    if stated is not None and list(stated) != wanted:
        raise UnsupportedModelError(
            f"no_rope_layers is {stated}; llama.cpp leaves every fourth layer of smollm3 without "
            "rotary embeddings and no other."
        )
    note_sliding_window(config, description)


def _describe_command_r(config: Config, description: Description) -> None:
    # src/models/command-r.cpp: Command R+ is told by its 64 layers.
    is_plus = config.layers >= 64
    if bool(config.get("use_qk_norm", False)) != is_plus:
        raise UnsupportedModelError(
            f"use_qk_norm is {config.get('use_qk_norm', False)} with {config.layers} layers; "
            "llama.cpp normalizes queries and keys from 64 layers on, and only then."
        )
    _describe_cohere(config, description)


def _describe_cohere(config: Config, description: Description) -> None:
    _check_grouped_width(config, "command-r")
    description.metadata["logit_scale"] = float(config.require("logit_scale"))
    # Written by its converter, whatever the rotation.
    description.metadata["rope.scaling.type"] = "none"


def _describe_cohere2(config: Config, description: Description) -> None:
    _describe_cohere(config, description)
    # Those that slide rotate, the others have no positions; src/models/cohere2.cpp alike.
    describe_windows(config, description, 4)


def _describe_exaone4(config: Config, description: Description) -> None:
    is_sliding = list_sliding(config, 4) if config.get("sliding_window") else []
    # src/models/exaone4.cpp knows windows in the model of 64 layers alone.
    if any(is_sliding) and config.layers != 64:
        raise UnsupportedModelError(
            f"llama.cpp has exaone4's sliding window for 64 layers only; this model has "
            f"{config.layers} and slides in {sum(is_sliding)} of them."
        )
    if any(is_sliding):
        if int(config.require("sliding_window")) < 1:
            raise UnsupportedModelError("exaone4's sliding_window must be at least 1.")
        describe_windows(config, description, 4)


def _describe_seed_oss(config: Config, description: Description) -> None:
    note_sliding_window(config, description)


def _describe_phi(config: Config, description: Description) -> None:
    check_absent(config, "phi2", qk_layernorm=False)
    check_heads_alike(config, "phi2")


def check_heads_alike(config: Config, architecture: str) -> None:
    """Refuse key/value heads that queries share, where llama.cpp does not have them."""
    if config.kv_heads != config.heads:
        raise UnsupportedModelError(
            f"num_key_value_heads is {config.kv_heads}; llama.cpp computes as many as heads "
            f"({config.heads}) for {architecture!r}."
        )


def _describe_stablelm(config: Config, description: Description) -> None:
    parallel = bool(config.get("use_parallel_residual", False))
    if parallel:
        check_absent(config, "stablelm", use_parallel_residual=False)
    check_absent(config, "stablelm", qk_layernorm=False)
    # A key that llama.cpp's converter writes and its runtime takes from the tensors instead.
    description.metadata["use_parallel_residual"] = parallel


def _describe_nemotron(config: Config, description: Description) -> None:
    description.metadata["rope.scaling.type"] = description.metadata.get(
        "rope.scaling.type", "none"
    )


def _describe_hunyuan(config: Config, description: Description) -> None:
    check_absent(config, "hunyuan-dense", num_experts=1)
    describe_alpha(config, description)


def describe_alpha(config: Config, description: Description) -> None:
    """Hunyuan's base for long contexts; no scaling is left, and the converter states the length."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) != "dynamic":
        return
    description.metadata |= {
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": _HUNYUAN_CONTEXT,
        "context_length": _HUNYUAN_CONTEXT,
    }


def _describe_ministral3(config: Config, description: Description) -> None:
    # Attention grows with the position beyond the trained length, as in Llama 4.
    rope = config.get("rope_parameters") or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta:
        description.metadata["attention.temperature_scale"] = float(beta)
        description.metadata.setdefault(
            "rope.scaling.original_context_length",
            int(
                rope.get("original_max_position_embeddings", description.metadata["context_length"])
            ),
        )
    note_sliding_window(config, description)


def _describe_lfm2(config: Config, description: Description) -> None:
    check_absent(config, "lfm2", conv_bias=False)
    types = list(config.require("layer_types"))
    width = int(config.require("intermediate_size"))
    if config.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        factor = config.get("block_ffn_dim_multiplier")
        if factor is not None:
            width = int(factor * width)
            multiple = int(config.require("block_multiple_of"))
            width = multiple * ((width + multiple - 1) // multiple)
    description.metadata |= {
        "feed_forward_length": width,
        # No head for keys is how llama.cpp tells a convolution from attention.
        "attention.head_count_kv": [
            config.kv_heads if kind == "full_attention" else 0 for kind in types
        ],
        "shortconv.l_cache": int(config.require("conv_L_cache")),
    }


def _read_xielu(source: TensorSource, config: Config, description: Description) -> None:
    """The four numbers of every layer's activation (arXiv:2411.13010), no tensors to llama.cpp."""
    for part in ("alpha_n", "alpha_p", "beta", "eps"):
        description.plain[f"xielu.{part}"] = [
            float(source.load(f"model.layers.{layer}.mlp.act_fn.{part}").float())
            for layer in range(config.layers)
        ]


DENSE: Final = (
    Family(
        "apertus",
        "apertus",
        activation="xielu",
        rotary_kinds=("llama3",),
        biases=(*_QKV, "o_proj"),
        read_values=_read_xielu,
        ignored=tuple(f"act_fn.{part}" for part in ("alpha_n", "alpha_p", "beta", "eps")),
    ),
    Family(
        "granite",
        "granite",
        transforms=ROTARY,
        biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
        describe=describe_granite,
    ),
    Family(
        "olmo",
        "olmo",
        transforms=ROTARY,
        epsilon="layer_norm_eps",
        # The norms have no weights, and their epsilon stands in the code.
        default_epsilon=1e-5,
        has_layer_norm=True,
        describe=_describe_olmo,
        block_tensors=("attn_output", "ffn_down"),
        tables=("token_embd",),
    ),
    Family(
        "olmo2",
        "olmo2",
        rotary_kinds=("linear", "yarn"),
        describe=_describe_olmo2,
        block_tensors=_POST_NORMS,
    ),
    Family(
        "olmo3",
        "olmo2",
        rotary_kinds=("yarn",),
        rotary_layer_type="full_attention",
        describe=_describe_olmo3,
        block_tensors=_POST_NORMS,
    ),
    Family(
        "smollm3",
        "smollm3",
        transforms=ROTARY,
        rotary_kinds=("linear", "yarn"),
        default_theta=2_000_000.0,
        ties_by_default=True,
        describe=_describe_smollm3,
    ),
    Family(
        "cohere",
        "command-r",
        epsilon="layer_norm_eps",
        has_layer_norm=True,
        ties_by_default=True,
        describe=_describe_command_r,
        block_tensors=("attn_norm", "attn_output", "ffn_down"),
    ),
    Family(
        "cohere2",
        "cohere2",
        epsilon="layer_norm_eps",
        has_layer_norm=True,
        ties_by_default=True,
        describe=_describe_cohere2,
        block_tensors=("attn_norm", "attn_output", "ffn_down"),
    ),
    Family(
        "gemma",
        "gemma",
        activation="gelu_pytorch_tanh",
        ties_by_default=True,
        transforms=NORMS_PLUS_ONE,
    ),
    Family(
        "ministral3",
        "mistral3",
        transforms=ROTARY,
        rotary_kinds=("linear", "yarn"),
        describe=_describe_ministral3,
    ),
    Family("glm4", "glm4", biases=_QKV),
    Family(
        "exaone4",
        "exaone4",
        rotary_kinds=("llama3", "linear"),
        describe=_describe_exaone4,
        block_tensors=_POST_NORMS,
    ),
    Family(
        "seed_oss",
        "seed_oss",
        biases=(*_QKV, "o_proj"),
        rotary_kinds=("linear", "yarn"),
        describe=_describe_seed_oss,
        block_tensors=("attn_norm", "attn_output", "post_attention_norm"),
    ),
    Family(
        "arcee",
        "arcee",
        activation="relu2",
        transforms=ROTARY,
        rotary_kinds=("linear", "yarn"),
    ),
    Family(
        "phi",
        "phi2",
        activation="gelu_new",
        epsilon="layer_norm_eps",
        has_layer_norm=True,
        biases=(*_QKV, "dense", "fc1", "fc2", *_PHI_NORMS, "lm_head"),
        describe=_describe_phi,
        block_tensors=("attn_norm", "attn_output", "ffn_down"),
    ),
    Family(
        "stablelm",
        "stablelm",
        epsilon="layer_norm_eps",
        has_layer_norm=True,
        biases=(*_QKV, *_LAYER_NORMS),
        describe=_describe_stablelm,
    ),
    Family(
        "starcoder2",
        "starcoder2",
        activation="gelu_pytorch_tanh",
        epsilon="norm_epsilon",
        has_layer_norm=True,
        ties_by_default=True,
        biases=(*_QKV, "o_proj", "c_fc", "c_proj", *_LAYER_NORMS),
        rotary_kinds=("linear", "yarn"),
        describe=note_sliding_window,
    ),
    Family("ernie4_5", "ernie4_5", ties_by_default=True, biases=(*_QKV, "o_proj")),
    Family(
        "hunyuan_v1_dense",
        "hunyuan-dense",
        scales_by_alpha=True,
        describe=_describe_hunyuan,
    ),
    Family(
        "nemotron",
        "nemotron",
        activation="relu2",
        epsilon="norm_eps",
        has_layer_norm=True,
        transforms=NORMS_PLUS_ONE,
        biases=(*_QKV, "o_proj", "up_proj", "down_proj", *_LAYER_NORMS),
        rotary_kinds=("linear",),
        describe=_describe_nemotron,
    ),
    Family(
        "lfm2",
        "lfm2",
        epsilon="norm_eps",
        ties_by_default=True,
        transforms={"conv.conv.weight": squeeze_convolution},
        describe=_describe_lfm2,
        block_tensors=("attn_norm", "ffn_norm", "ffn_down"),
        tables=("token_embd", "token_embd_norm"),
        default_theta=1_000_000.0,
    ),
)
