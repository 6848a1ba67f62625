"""What sets the families of decoders apart, one entry each; :mod:`layer` computes all of them.

Nothing heavy is imported: the choice of an engine reads this before any library is loaded. The
authority for each entry is transformers' ``modeling_*.py`` of that family, its order of rounding
included; :mod:`family_reader` takes from a model in memory what an entry describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["FAMILIES", "WRAPPERS", "Family", "NormKind"]

#: ``rms``: root mean square, rounded before the weight is applied; ``rms_wide``: after;
#: ``layer``: the mean is taken off too. ``_plus_one``: the weight is stored less one.
NormKind = Literal["rms", "rms_wide", "rms_plus_one", "layer", "layer_plus_one"]


@dataclass(frozen=True)
class Family:
    """A family of decoders, by what is not as in Llama.

    Attributes:
        decoder: transformers' class of the decoder.
        norm: What its norms compute.
        norms: Names of a layer's norms: before attention, on its output, before the feed-forward
            block, on its output. ``None`` where there is none.
        head_norms: Names of the norms of queries and keys, where a model has them.
        head_norms_over: Whether those norm a ``"head"`` or ``"all"`` heads together.
        head_norms_turned: Whether they come after the rotation.
        qkv: Projections that read the layer's input.
        out: The projection of what was attended.
        gate_up: Projections that read the feed-forward block's input: gate and up, in one or two,
            or one without a gate (see ``is_gated``).
        down: The projection that ends the block.
        is_gated: Whether the activation of one half is multiplied with the other.
        activation: The configuration's name for the activation.
        parallel: Which setting says that both blocks read the same normalized input; ``True``
            where none does.
        pairs: Whether a dimension turns with its neighbour rather than half a head away.
        laid_in_pairs: Whether transformers' cosines and sines already repeat for neighbours.
        rotates_wide: Whether queries and keys are rotated in float32.
        layer_windows: Whether ``layer_types`` says which layers have the sliding window; else all
            layers have the one that is configured.
        rotated_layers: Which layers have positions: ``"all"``, those that ``no_rope_layers`` says,
            or those with a window where there is one.
        caps_attention: Whether attention scores are soft-capped by ``attn_logit_softcapping``.
        caps_logits: Whether logits are, by ``final_logit_softcapping``.
        stretches_queries: Whether queries grow with their position (``llama_4_scaling_beta``).
        multiplier: What embeddings are multiplied with, beyond what their module does itself.
        residual: What a block's output is multiplied with before it is added.
        logit_scale: What logits are multiplied with; with a leading ``/``, divided by.
        dropouts: Settings besides ``attention_dropout`` under which training draws random numbers.
    """

    decoder: str
    norm: NormKind = "rms"
    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm", None, "post_attention_layernorm", None,
    )  # fmt: skip
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    head_norms_over: Literal["head", "all"] = "head"
    head_norms_turned: bool = False
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    is_gated: bool = True
    activation: str = "hidden_act"
    parallel: bool | str = False
    pairs: bool = False
    laid_in_pairs: bool = False
    rotates_wide: bool = False
    layer_windows: bool = False
    rotated_layers: Literal["all", "no_rope_layers", "sliding"] = "all"
    caps_attention: bool = False
    caps_logits: bool = False
    stretches_queries: bool = False
    multiplier: str | None = None
    residual: str | None = None
    logit_scale: str | None = None
    dropouts: tuple[str, ...] = ()

    @property
    def post_norms(self) -> int:
        """Norms of what a layer's blocks put out."""
        return sum(name is not None for name in self.norms[1::2])


_SANDWICHED: Final = (
    "input_layernorm", "post_attention_layernorm",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_AFTER: Final = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_ONE: Final = ("input_layernorm", None, None, None)
_FUSED_GATE: Final = ("gate_up_proj",)

#: By the model type in a ``config.json``.
FAMILIES: Final[dict[str, Family]] = {
    "arcee": Family("ArceeModel", gate_up=("up_proj",), is_gated=False),
    "cohere": Family(
        "CohereModel", norm="layer", norms=_ONE, parallel=True, pairs=True, laid_in_pairs=True,
        rotates_wide=True, logit_scale="logit_scale",
    ),
    "cohere2": Family(
        "Cohere2Model", norm="layer", norms=_ONE, parallel=True, pairs=True, laid_in_pairs=True,
        rotates_wide=True, layer_windows=True, rotated_layers="sliding", logit_scale="logit_scale",
    ),
    "cwm": Family("CwmModel", layer_windows=True),
    "ernie4_5": Family("Ernie4_5Model", pairs=True, rotates_wide=True),
    "exaone4": Family(
        "Exaone4Model", norms=_AFTER, layer_windows=True, rotated_layers="sliding"
    ),
    "gemma": Family("GemmaModel", norm="rms_plus_one"),
    "gemma2": Family(
        "Gemma2Model", norm="rms_plus_one", norms=_SANDWICHED, activation="hidden_activation",
        layer_windows=True, caps_attention=True, caps_logits=True,
    ),
    "gemma3_text": Family(
        "Gemma3TextModel", norm="rms_plus_one", norms=_SANDWICHED,
        activation="hidden_activation", layer_windows=True, caps_logits=True,
    ),
    "glm": Family("GlmModel", gate_up=_FUSED_GATE, pairs=True),
    "glm4": Family(
        "Glm4Model", gate_up=_FUSED_GATE, pairs=True,
        norms=(
            "input_layernorm", "post_self_attn_layernorm",
            "post_attention_layernorm", "post_mlp_layernorm",
        ),
    ),
    "granite": Family(
        "GraniteModel", multiplier="embedding_multiplier", residual="residual_multiplier",
        logit_scale="/logits_scaling",
    ),
    "granitemoe": Family(
        "GraniteMoeModel", multiplier="embedding_multiplier", residual="residual_multiplier",
        logit_scale="/logits_scaling",
    ),
    "helium": Family("HeliumModel", norm="rms_wide", pairs=True),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1Model", head_norms=("query_layernorm", "key_layernorm"),
        head_norms_turned=True,
    ),
    "hyperclovax": Family(
        "HyperCLOVAXModel", multiplier="embedding_multiplier", residual="residual_multiplier",
        logit_scale="logits_scaling",
        norms=("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    ),
    "jais2": Family("Jais2Model", norm="layer", gate_up=("up_proj",), is_gated=False),
    "llama": Family("LlamaModel"),
    "ministral": Family("MinistralModel", layer_windows=True),
    "ministral3": Family("Ministral3Model", stretches_queries=True),
    "mistral": Family("MistralModel"),
    "mixtral": Family("MixtralModel", dropouts=("router_jitter_noise",)),
    "nemotron": Family(
        "NemotronModel", norm="layer_plus_one", gate_up=("up_proj",), is_gated=False
    ),
    "olmo2": Family(
        "Olmo2Model", norm="rms_wide", norms=_AFTER, head_norms_over="all", rotates_wide=True
    ),
    "olmo3": Family(
        "Olmo3Model", norm="rms_wide", norms=_AFTER, head_norms_over="all", rotates_wide=True,
        layer_windows=True,
    ),
    # Clipped projections are as little computed here as dropout.
    "olmoe": Family("OlmoeModel", head_norms_over="all", dropouts=("clip_qkv",)),
    "phi3": Family(
        "Phi3Model", qkv=("qkv_proj",), gate_up=_FUSED_GATE, dropouts=("resid_pdrop",)
    ),
    "qwen2": Family("Qwen2Model", layer_windows=True),
    "qwen2_moe": Family("Qwen2MoeModel", layer_windows=True),
    "qwen3": Family("Qwen3Model", layer_windows=True),
    "qwen3_moe": Family("Qwen3MoeModel"),
    "smollm3": Family("SmolLM3Model", layer_windows=True, rotated_layers="no_rope_layers"),
    "stablelm": Family(
        "StableLmModel", norm="layer", head_norms=("q_layernorm", "k_layernorm"),
        parallel="use_parallel_residual", dropouts=("hidden_dropout",),
    ),
    "starcoder2": Family(
        "Starcoder2Model", norm="layer", gate_up=("c_fc",), down="c_proj", is_gated=False,
        dropouts=("residual_dropout", "embedding_dropout"),
    ),
    "vaultgemma": Family(
        "VaultGemmaModel", norm="rms_plus_one",
        norms=("input_layernorm", None, "pre_feedforward_layernorm", None),
        activation="hidden_activation", layer_windows=True, caps_attention=True, caps_logits=True,
    ),
}  # fmt: skip

#: Models that also see, by model type, and what their text part is where a file does not say.
WRAPPERS: Final = {"gemma3": "gemma3_text", "mistral3": "mistral"}
