"""What the decoder covers; everything else is answered by transformers' ``generate``."""

from __future__ import annotations

from typing import Any, Final

import torch

from qlora_kit.engines.modules import list_modules
from qlora_kit.engines.native.layers.architectures import find_model_obstacle
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle
from qlora_kit.engines.native.layers.rounding import is_rounding

__all__ = ["find_decoding_obstacle", "find_kernel_obstacle", "find_settings_obstacle"]

#: Fields of a ``GenerationConfig`` that the decoder honours: limits, end tokens, and whatever
#: works on the scores of one answer, which transformers' own processors then do.
_HONOURED: Final = frozenset(
    {
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature",
        "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
        "begin_suppress_tokens", "forced_eos_token_id", "exponential_decay_length_penalty",
        "renormalize_logits", "remove_invalid_values", "eos_token_id", "pad_token_id",
        "bos_token_id", "use_cache", "num_beams", "num_return_sequences", "transformers_version",
        # Belong to ways of generating that are off.
        "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
        "assistant_confidence_threshold", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "is_assistant",
        "max_matching_ngram_size", "return_dict_in_generate", "disable_compile",
    }
)  # fmt: skip


def find_decoding_obstacle(model: Any) -> str | None:
    """Why the decoder cannot read a model, or ``None``; projections are looked at elsewhere.

    Args:
        model: A transformers or peft model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    obstacle = find_model_obstacle(base)
    if obstacle is not None:
        return obstacle
    if getattr(model, "active_peft_config", None) is not None and (
        getattr(model.active_peft_config, "is_prompt_learning", False)
    ):
        return "the adapter adds virtual tokens"
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return "the language-model head is adapted, quantized or has a bias"
    # Gemma's own multiplies what it looks up.
    if type(embedding) is not torch.nn.Embedding and not hasattr(embedding, "embed_scale"):
        return "the token embedding is adapted"
    if embedding.weight.dtype != head.weight.dtype:
        return "the embedding and the head have different dtypes"
    if not head.weight.dtype.is_floating_point or head.weight.device.type not in ("cpu", "cuda"):
        return f"{head.weight.dtype} weights on {head.weight.device.type}"
    parts = list_modules(model)
    devices = {p.device for part in parts for p in part._parameters.values() if p is not None}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    for owner in {id(model): model, id(base): base}.values():
        if "generate" in vars(owner):
            return "its generate method was replaced"
    return _find_hook(model, parts)


def _find_hook(model: Any, parts: list[Any]) -> str | None:
    """What looks into the forward pass of modules, or changes it, would see none here."""
    for part in parts:
        if part._forward_hooks or part._forward_pre_hooks or hasattr(part, "_hf_hook"):
            return f"{_name(model, part)} has a forward hook"
        if "forward" in vars(part) and not is_rounding(vars(part)["forward"]):
            return f"the forward method of {_name(model, part)} was replaced"
    return None


def _name(model: Any, part: Any) -> str:
    found = next(name for name, module in model.named_modules() if module is part)
    return found or "the model"


def find_kernel_obstacle(decoder: Any) -> str | None:
    """Why the kernels of a GPU do not compute a decoder's steps, or ``None``.

    Args:
        decoder: A :class:`decoder.Decoder` with its layers read.
    """
    shape = decoder.shape
    missing = {
        f"norms of kind {shape.norm}": shape.norm.startswith("layer"),
        "queries and keys normalized over all heads or after turning": (
            shape.head_norms_over_all or shape.head_norms_turned
        ),
        "attention and feed-forward block side by side": shape.is_parallel,
        "norms with biases": any(
            norm is not None and norm.bias is not None
            for layer in decoder.layers for norm in layer.tensors[:6]
        ),
        "positions that differ in width": len(decoder.turned_widths) > 1,
    }  # fmt: skip
    found = next((what for what, is_so in missing.items() if is_so), None)
    return found or find_compile_obstacle(decoder.device)


def find_settings_obstacle(config: Any) -> str | None:
    """Which field of a ``GenerationConfig`` the decoder does not honour, or ``None``."""
    from transformers import GenerationConfig

    usual = vars(GenerationConfig())
    for name, value in vars(config).items():
        if name.startswith("_") or name in _HONOURED:
            continue
        # Not asked for is None in one version or class and False in another.
        if value and value != usual.get(name):
            return f"{name}={value!r}"
    if config.use_cache is False:
        return "use_cache=False"
    return None
