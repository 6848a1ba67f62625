"""Which models and settings the fast path covers; everything else trains through TRL."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kit.engines.native.layers.architectures import find_decoder, find_model_obstacle
from qlora_kit.engines.native.layers.expert_layers import find_block, find_expert_obstacle
from qlora_kit.engines.native.layers.family_reader import find_norms, list_projections

__all__ = ["find_obstacle"]


def find_obstacle(model: Any, args: Any) -> str | None:
    """Why a run cannot use the fast path, or ``None``.

    Args:
        model: A ``PeftModel``.
        args: The run's ``SFTConfig``.
    """
    return _find_in_model(model) or _find_in_settings(args, _dtype_of(model))


def _dtype_of(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_base_model().get_input_embeddings().weight.dtype
    return dtype


def _find_in_model(model: Any) -> str | None:
    base = model.get_base_model()
    obstacle = find_model_obstacle(base)
    if obstacle is not None:
        return obstacle
    found = find_decoder(base)
    assert found is not None
    decoder, family = found
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None:
        return "the model has no language-model head"
    if embedding.weight.dtype != _find_dtype(head):
        return "the embedding and the head have different dtypes"
    known = {id(parameter) for module in (embedding, head) for parameter in module.parameters()}
    known |= {id(parameter) for parameter in decoder.norm.parameters()}
    for layer in decoder.layers:
        norms = [norm for norm in find_norms(layer, family).values() if not hasattr(norm, "norms")]
        if any(not hasattr(norm, "weight") for norm in norms):
            return "a normalization has no weight"
        projections = [one for group in list_projections(layer, family).values() for one in group]
        parts = [*norms, *projections]
        block = find_block(layer)
        if block is not None:
            obstacle = find_expert_obstacle(block, embedding.weight.dtype)
            if obstacle is not None:
                return obstacle
            parts.append(block)
        known |= {id(one) for part in parts for one in part.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            return f"{name} is trained, which is no part of a projection, a norm or the vocabulary"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    if not any(hasattr(module, "lora_A") for module in decoder.modules()):
        return "the adapter is not LoRA"
    return None


def _find_dtype(head: Any) -> torch.dtype:
    """What a head computes in; a quantized one's weight would say what it is packed in."""
    base = head.base_layer if hasattr(head, "base_layer") else head
    dtype: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
    return dtype


def _find_in_settings(args: Any, dtype: torch.dtype) -> str | None:
    if args.deepspeed or args.fsdp:
        return "DeepSpeed or FSDP is in use"
    if getattr(args, "parallelism_config", None) is not None:
        return "a parallelism_config is in use"
    if args.loss_type not in (None, "nll", "chunked_nll"):
        return f"loss_type={args.loss_type!r}"
    # What is looked for in the forward pass of modules happens in none here.
    for name in ("label_smoothing_factor", "neftune_noise_alpha", "debug"):
        if getattr(args, name, None):
            return f"{name}={getattr(args, name)}"
    if args.optim in ("lomo", "adalomo"):
        return f"{args.optim.value} steps in the backward pass"
    for name in (
        "activation_offloading",
        "use_liger_kernel",
        "torch_compile",
        "auto_find_batch_size",
    ):
        if getattr(args, name, False):
            return f"{name}=True"
    if (args.bf16 and dtype != torch.bfloat16) or (args.fp16 and dtype != torch.float16):
        return f"mixed precision over a {dtype} model"
    return None
