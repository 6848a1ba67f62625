"""The two factors of every adapted matrix, as llama.cpp applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.conversion.tensors import (
    find_block,
    find_change,
    make_name_mapper,
)
from qlora_kit.exporters.gguf.conversion.text_model import name_in_text_model
from qlora_kit.exporters.gguf.families.table import Config, Family, read_family
from qlora_kit.hookspecs import ExportRequest
from qlora_kit.weights.adapter import CHANGES_BASE, find_active_adapter, is_vocabulary_resized
from qlora_kit.weights.live import check_adapters

if TYPE_CHECKING:
    import torch

__all__ = [
    "MERGE_INSTEAD",
    "Factors",
    "collect_factors",
    "find_configuration",
    "list_invocation_tokens",
]

MERGE_INSTEAD: Final = "Export with 'gguf', which merges the adapter."


@dataclass(frozen=True)
class Factors:
    """One adapted matrix.

    Attributes:
        name: GGUF name of the matrix.
        a: Shape (rank, inputs).
        b: Shape (outputs, rank), rows in llama.cpp's order, scaled so that llama.cpp's
            ``alpha / rank`` gives the scaling that was trained with.
        scale: That ``alpha / rank``.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def find_configuration(request: ExportRequest) -> tuple[str, Any]:
    """The one active adapter and its peft configuration.

    Raises:
        UnsupportedModelError: When llama.cpp could not apply it.
    """
    model, adapter = find_active_adapter(request.model, instead=MERGE_INSTEAD)
    check_adapters(model.model)
    config = model.model.peft_config[adapter]
    asked = {config.init_lora_weights, model.adapter.init_lora_weights}
    changing = (*CHANGES_BASE, "loftq")
    started = [str(way) for way in asked if str(way).lower().startswith(changing)]
    faults = {
        "DoRA": config.use_dora,
        "trained biases": config.bias != "none" or getattr(config, "lora_bias", False),
        "modules_to_save": bool(config.modules_to_save),
        "embeddings of its own": (bool(model.carried_tensors) or is_vocabulary_resized(model)),
        "tokens trained alone": bool(getattr(config, "trainable_token_indices", None)),
        f"an adapter started by {' and '.join(started)}, which fits changed base weights only": (
            bool(started) or bool(model.adapter.loftq_config)
        ),
    }
    if getattr(config, "target_parameters", None):
        raise UnsupportedModelError(
            "Adapters of experts (target_parameters) are not written as an adapter in GGUF. "
            + MERGE_INSTEAD
        )
    found = [what for what, is_there in faults.items() if is_there]
    if found:
        raise UnsupportedModelError(
            f"llama.cpp's --lora has no {', '.join(found)}. {MERGE_INSTEAD}"
        )
    return adapter, config


def list_invocation_tokens(config: Any) -> list[int]:
    """Tokens behind which an aLoRA is switched on; none of other adapters."""
    return list(getattr(config, "alora_invocation_tokens", None) or ())


def collect_factors(request: ExportRequest) -> Iterator[Factors]:
    """The factors of every adapted matrix, in the model's order.

    Raises:
        UnsupportedModelError: When a module is adapted that llama.cpp has no place for.
    """
    adapter, config = find_configuration(request)
    family, wrapped = read_family(request.model.model.config.to_dict())
    to_gguf = make_name_mapper(family, wrapped.layers)
    alpha = float(config.lora_alpha)
    modules = dict(request.model.model.base_model.model.named_modules())
    is_wrapped = any("language_model." in name for name in modules)
    for module_name, module in modules.items():
        if getattr(module, "lora_embedding_A", None):
            raise UnsupportedModelError(
                f"{module_name} is an adapted embedding, which is not supported as GGUF. "
                + MERGE_INSTEAD
            )
        if adapter not in getattr(module, "lora_A", {}):
            continue
        name: str | None = f"{module_name}.weight"
        if is_wrapped:
            name = name_in_text_model(f"{module_name}.weight")
        if name is None and not module.lora_B[adapter].weight.any():
            continue  # text alone never trained it
        if name is None:
            raise UnsupportedModelError(
                f"{module_name} is adapted and no part of the text model, which is what llama.cpp "
                f"applies an adapter to. {MERGE_INSTEAD}"
            )
        if wrapped.get("tie_word_embeddings", False) and module_name == "lm_head":
            raise UnsupportedModelError(
                "The adapted language-model head is tied to the embeddings, which llama.cpp cannot "
                f"adapt apart. {MERGE_INSTEAD}"
            )
        # W x + s B (A x), with A (r, in) and B (out, r). llama.cpp takes s for alpha / r, with
        # one alpha for the file and each matrix's own r (llama_adapter_lora_weight::get_scale,
        # llama-adapter.h). What peft's s is besides, as with rsLoRA's alpha / sqrt(r) or a rank
        # pattern, goes into B; into B because only its rows are reordered below.
        a = module.lora_A[adapter].weight.detach().float().cpu()
        b = module.lora_B[adapter].weight.detach().float().cpu()
        rank = a.shape[0]
        b = b * (float(module.scaling[adapter]) * rank / alpha)
        for gguf_name, own_a, own_b in _place_factors(family, wrapped, to_gguf, name, a, b):
            yield Factors(gguf_name, own_a.contiguous(), own_b.contiguous(), alpha / rank)


def _place_factors(
    family: Family,
    config: Config,
    to_gguf: Callable[[str], str],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Both factors as the base's file has the matrix, of which it may have parts."""
    if name.endswith(family.unadapted):
        raise UnsupportedModelError(
            f"{name} is adapted, and llama.cpp multiplies with it past any adapter. "
            + MERGE_INSTEAD
        )
    # Rows of B are outputs and columns of A are inputs, so whatever reorders the matrix's rows
    # reorders B's, and whatever reorders its columns A's.
    inputs = find_change(family.columns, name)
    a = a if inputs is None else inputs(a, config)
    parts = find_change(family.splits, name)
    if parts is None:
        outputs = find_change(family.transforms, name)
        yield to_gguf(name), a, b if outputs is None else outputs(b, config)
        return
    block = find_block(name)
    for part, cut in parts.items():
        rows = cut(b, config)
        if rows.ndim != 2 or rows.shape[1] != b.shape[1]:
            raise UnsupportedModelError(
                f"{name} is adapted, and llama.cpp has it taken apart ({', '.join(parts)}) so that "
                f"no adapter fits. {MERGE_INSTEAD}"
            )
        yield f"blk.{block}.{part}", a, rows
