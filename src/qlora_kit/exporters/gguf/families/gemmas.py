"""Gemma 3n and Gemma 4: layers of two widths, shared keys, an embedding for each layer.

What llama.cpp reads and computes is in ``src/models/gemma3n.cpp`` and ``gemma4.cpp``, what its
converter writes in ``conversion/gemma.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.dense import check_absent
from qlora_kit.exporters.gguf.families.family import Config, Description, Family, Transform
from qlora_kit.exporters.gguf.families.rope import describe_rope, read_rope
from qlora_kit.exporters.gguf.families.transforms import keep

if TYPE_CHECKING:
    import torch

__all__ = ["GEMMAS"]

#: What src/models/gemma3n.cpp and llama-hparams.h have as numbers, not as keys.
_OWN_KEYS: Final = 20
_SPARSE_LAYERS: Final = 10
_SPARSITY: Final = 0.95
_CAP: Final = 30.0


def pad_vocabulary(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """An embedding with as many rows as the vocabulary: pictures and sounds have none here."""
    import torch

    missing = int(config.require("vocab_size")) - weight.shape[0]
    if missing <= 0:
        return weight
    return torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])


def _describe_sliding(config: Config, description: Description) -> list[bool]:
    """The window, and the rotation of the layers that have one."""
    local = read_rope(config.values, "sliding_attention")
    if local.kind != "default" or local.parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"The sliding layers of this {config.get('model_type')} rotate in a way "
            f"({local.kind!r}) that llama.cpp does not compute for them."
        )
    is_sliding = [kind == "sliding_attention" for kind in config.require("layer_types")]
    description.metadata |= {
        "attention.sliding_window": int(config.require("sliding_window")),
        "attention.sliding_window_pattern": is_sliding,
        "rope.freq_base_swa": local.theta,
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input", 0)),
    }
    return is_sliding


def _check_shared_keys(config: Config, is_sliding: list[bool]) -> int:
    """How many layers have keys of their own; the others take those of the last two."""
    # llama-model.cpp: the last layer with keys is for full attention, the one before it slides.
    own = config.layers - int(config.get("num_kv_shared_layers", 0))
    if own < config.layers and (own < 2 or is_sliding[own - 1] or not is_sliding[own - 2]):
        raise UnsupportedModelError(
            f"{config.layers - own} layers share keys and values, and llama.cpp takes those of "
            f"layers {own - 2} (sliding) and {own - 1} (full attention), which here are of other "
            "kinds."
        )
    return own


def _describe_gemma3n(config: Config, description: Description) -> None:
    # None of these is a key that llama.cpp reads.
    check_absent(
        config,
        "gemma3n",
        altup_num_inputs=4,
        altup_active_idx=0,
        altup_correct_scale=True,
        laurel_rank=64,
        hidden_size_per_layer_input=256,
    )
    cap = config.values.get("final_logit_softcapping", _CAP)
    if cap != _CAP:
        raise UnsupportedModelError(
            f"final_logit_softcapping is {cap}; llama.cpp caps the logits of gemma3n at {_CAP}."
        )
    is_sliding = _describe_sliding(config, description)
    own = _check_shared_keys(config, is_sliding)
    if own != min(config.layers, _OWN_KEYS):
        raise UnsupportedModelError(
            f"{own} of {config.layers} layers have keys of their own; llama.cpp gives gemma3n's "
            f"first {_OWN_KEYS} layers theirs and no other."
        )
    sparsity = [float(part) for part in config.require("activation_sparsity_pattern")]
    wanted = [_SPARSITY if i < _SPARSE_LAYERS else 0.0 for i in range(config.layers)]
    if sparsity != wanted:
        raise UnsupportedModelError(
            f"activation_sparsity_pattern is {sparsity}; llama.cpp computes {_SPARSITY} in the "
            f"first {_SPARSE_LAYERS} layers of gemma3n and no sparsity behind them."
        )
    description.notes.append(
        "llama.cpp estimates the spread of a layer's gates over one number fewer than transformers "
        "does before it keeps the largest ones: that moves each by some thousandths of a per cent."
    )
    normal = NormalDist()
    description.metadata |= {
        "altup.active_idx": 0,
        "altup.num_inputs": 4,
        "attention.shared_kv_layers": config.layers - own,
        "activation_sparsity_scale": [
            normal.inv_cdf(part) if part else float("-inf") for part in sparsity
        ],
        "final_logit_softcapping": _CAP,
    }
    # Never read, but missed: llama.cpp shares what was computed, transformers the matrices too.
    width = config.kv_heads * config.head_dim
    columns = int(config.require("hidden_size"))
    for layer in range(own, config.layers):
        description.fillers |= {
            f"blk.{layer}.attn_k.weight": (width, columns),
            f"blk.{layer}.attn_v.weight": (width, columns),
            f"blk.{layer}.attn_k_norm.weight": (config.head_dim,),
        }


def _read_full(config: Config, stated: str, key: str, is_sliding: list[bool]) -> Any:
    """What is particular to full attention, as the hub says it or as transformers 5.17 does."""
    if config.get(stated) is not None:
        return config.get(stated)
    layers: Mapping[Any, Any] = config.get("per_layer_config") or {}
    full = is_sliding.index(False) if False in is_sliding else None
    own = layers.get(full, layers.get(str(full))) or {}
    return own.get(key)


def _describe_gemma4(config: Config, description: Description) -> None:
    if config.get("use_bidirectional_attention") == "all":
        raise UnsupportedModelError("This gemma4 model attends both ways: it is an encoder.")
    is_sliding = _describe_sliding(config, description)
    own = _check_shared_keys(config, is_sliding)
    width = int(_read_full(config, "global_head_dim", "head_dim", is_sliding) or config.head_dim)
    keys = config.kv_heads
    if config.get("attention_k_eq_v", False):
        stated = _read_full(config, "num_global_key_value_heads", "num_key_value_heads", is_sliding)
        keys = int(stated or keys)
    rope = read_rope(config.values, "full_attention", 1_000_000.0)
    context = int(description.metadata["context_length"])
    rotation, description.tables = describe_rope(rope, width, context)
    description.metadata |= {
        **rotation,
        "rope.dimension_count_swa": config.head_dim,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.shared_kv_layers": config.layers - own,
    }
    if keys != config.kv_heads:
        description.metadata["attention.head_count_kv"] = [
            config.kv_heads if slides else keys for slides in is_sliding
        ]
    if config.get("use_double_wide_mlp", False):
        inner = int(config.require("intermediate_size"))
        description.metadata["feed_forward_length"] = [
            inner if layer < own else 2 * inner for layer in range(config.layers)
        ]
    if config.get("enable_moe_block", False):
        description.metadata |= {
            "expert_count": int(config.require("num_experts")),
            "expert_used_count": int(config.require("top_k_experts")),
            "expert_feed_forward_length": int(config.require("moe_intermediate_size")),
        }
    if config.get("final_logit_softcapping") is not None:
        cap = float(config.get("final_logit_softcapping"))
        description.metadata["final_logit_softcapping"] = cap


#: Both have as many rows as the vocabulary, whatever sees or hears may have besides.
_EMBEDDINGS: Final[Mapping[str, Transform]] = {
    "embed_tokens.weight": pad_vocabulary,
    "embed_tokens_per_layer.weight": pad_vocabulary,
}
_SANDWICH: Final = (
    "attn_norm",
    "attn_output",
    "post_attention_norm",
    "ffn_norm",
    "ffn_down",
    "post_ffw_norm",
)

GEMMAS: Final = (
    Family(
        "gemma3n_text",
        "gemma3n",
        activation="gelu_pytorch_tanh",
        ties_by_default=True,
        transforms=_EMBEDDINGS,
        splits={"altup.correct_output_scale": {"altup_correct_scale.weight": keep}},
        stacks={
            "model.altup_projections.{n}.weight": "altup_proj.weight",
            "model.altup_unembed_projections.{n}.weight": "altup_unembd_proj.weight",
        },
        unadapted=("modality_router.weight", "per_layer_model_projection.weight"),
        describe=_describe_gemma3n,
        rotary_layer_type="full_attention",
        default_theta=1_000_000.0,
        block_tensors=(*_SANDWICH, "laurel_l", "altup_router"),
        tables=("token_embd", "output_norm", "per_layer_token_embd", "altup_proj"),
    ),
    Family(
        "gemma4_text",
        "gemma4",
        activation="gelu_pytorch_tanh",
        ties_by_default=True,
        transforms=_EMBEDDINGS,
        splits={
            "layer_scalar": {"layer_output_scale.weight": keep},
            "router.scale": {"ffn_gate_inp.scale": keep},
            "router.per_expert_scale": {"ffn_down_exps.scale": keep},
            "experts.gate_up_proj": {"ffn_gate_up_exps.weight": keep},
            "experts.down_proj": {"ffn_down_exps.weight": keep},
        },
        unadapted=("per_layer_model_projection.weight",),
        describe=_describe_gemma4,
        rotary_kinds=("proportional",),
        rotary_layer_type="full_attention",
        default_theta=1_000_000.0,
        block_tensors=_SANDWICH,
    ),
)
