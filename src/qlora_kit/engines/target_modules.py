"""Modules that take an adapter: presets and names, held against the model before attaching."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_kit.config import (
    ATTENTION_ALIASES,
    DEFAULT_TARGET_MODULES,
    MLP_ALIASES,
    TARGET_PRESETS,
    AdapterConfig,
)
from qlora_kit.engines.target_parameters import find_parameters, list_expert_stacks
from qlora_kit.errors import ConfigError, did_you_mean, invalid_value
from qlora_kit.messages import Setting

__all__ = ["check_layers", "check_names", "check_pattern", "check_ranks", "resolve_targets"]

logger = logging.getLogger(__name__)


def resolve_targets(asked: str | Sequence[str], model: Any, *, are_alone: bool) -> tuple[str, ...]:
    """What was asked for, as names that end those of this model's modules.

    Args:
        asked: Names, or one of the presets.
        model: The base.
        are_alone: Whether no parameters are adapted besides.

    Raises:
        ConfigError: For what is no name of a module that an adapter can change.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    available = _names_of(model, (*linear, torch.nn.Embedding))
    # The default itself, not its names: whoever types them means them. Experts are no modules, and
    # what trains around them is for the user to choose.
    is_default = asked is DEFAULT_TARGET_MODULES
    if is_default and not are_alone:
        return tuple(name for name in asked if name in available)
    if is_default and set(asked) <= set(available) and list_expert_stacks(model):
        logger.warning(
            "Shared experts and layers without experts get adapters, the experts that tokens are "
            "routed to do not: target_parameters='experts' adapts those."
        )
    if is_default and not set(asked) <= set(available) and not _advise_on_experts(model):
        asked = "all-linear"
        logger.warning(
            "This model has other projections than Llama's; %s is trained instead.",
            Setting("target_modules", asked, "attach_lora"),
        )
    if isinstance(asked, str):
        if asked == "all-linear":
            # As in peft and the QLoRA paper: every linear layer but the language-model head.
            head = model.get_output_embeddings()
            return tuple(_names_of(model, linear, leave_out=head))
        if asked in ("attention", "mlp"):
            aliases = ATTENTION_ALIASES if asked == "attention" else MLP_ALIASES
            found = tuple(name for name in available if name in aliases)
            if not found:
                raise ConfigError(
                    Setting("target_modules", asked, "attach_lora"),
                    " matches nothing in this model. It has: "
                    f"{', '.join(available)}.{_advise_on_experts(model)}",
                    parameter="target_modules",
                    value=asked,
                )
            return found
        asked = (asked,)
    if not isinstance(asked, Iterable) or isinstance(asked, Mapping):
        raise ConfigError(
            Setting("target_modules", of="attach_lora"),
            f" must be module names or one of {', '.join(TARGET_PRESETS)}; got {asked!r}. This "
            f"model has: {', '.join(available)}.",
            parameter="target_modules",
            value=asked,
        )
    names = tuple(dict.fromkeys(asked))
    if not names and are_alone:
        raise ConfigError(f"target_modules is empty. This model has: {', '.join(available)}.")
    check_names(names, "target_modules", model, kinds=(*linear, torch.nn.Embedding))
    return names


def check_names(
    names: Iterable[str], parameter: str, model: Any, *, kinds: tuple[type, ...] = (object,)
) -> None:
    """Refuse names that no module of some kinds ends with.

    Raises:
        ConfigError: Names them, what there is, and what was meant.
    """
    # As peft matches them: "q_proj" and "layers.0.self_attn.q_proj" are both suffixes of a name.
    whole = [f".{name}" for name, module in model.named_modules() if isinstance(module, kinds)]
    unknown = [
        name
        for name in names
        if not isinstance(name, str) or not any(known.endswith(f".{name}") for known in whole)
    ]
    if unknown:
        available = _names_of(model, kinds)
        presets = f" Presets: {', '.join(TARGET_PRESETS)}." if parameter == "target_modules" else ""
        hints = "".join(
            dict.fromkeys(
                did_you_mean(str(name), (*available, *TARGET_PRESETS)) for name in unknown
            )
        )
        raise ConfigError(
            f"{parameter}: this model has no {', '.join(map(repr, unknown))}.{hints} "
            f"It has: {', '.join(available)}.{presets}{_advise_on_experts(model)}"
        )


def _advise_on_experts(model: Any) -> str:
    """What to do about experts that transformers holds in one parameter for all of them."""
    stacks = list_expert_stacks(model)
    if not stacks:
        return ""
    return (
        f" This model's experts lie together in {' and '.join(stacks)}, which adapters of modules "
        "do not reach: target_parameters='experts' adapts them, target_modules='attention' trains "
        "around them."
    )


def check_layers(layers: Sequence[int] | int | None, model: Any) -> None:
    """Refuse indices of layers that the model does not have."""
    if layers is None:
        return
    count = model.config.get_text_config().num_hidden_layers
    asked = [layers] if isinstance(layers, int) else list(layers)
    wrong = [layer for layer in asked if not isinstance(layer, int) or not 0 <= layer < count]
    if wrong or not asked:
        raise ConfigError(
            f"layers_to_transform: this model has layers 0 to {count - 1}, got {layers!r}."
        )


def check_ranks(config: AdapterConfig, targets: Sequence[str], model: Any) -> None:
    """Refuse ranks beyond every adapted matrix: they would fill memory with nothing."""
    parameters = config.target_parameters or ()
    stacks = [
        max(one.shape[-2:])
        for name, one in find_parameters(model).items()
        if f".{name}".endswith(tuple(f".{own}" for own in parameters))
    ]
    modules = (
        getattr(module, name, 0)
        for path, module in model.named_modules()
        if path.endswith(tuple(targets))
        # The last two are GPT-2's, whose linear layers are of a kind of their own.
        for name in (
            "in_features", "out_features", "num_embeddings", "embedding_dim", "nx", "nf",
        )
    )  # fmt: skip
    largest = max([*stacks, *modules])
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if rank > largest:
            raise invalid_value(
                "r", f"is beyond the {largest} rows of the largest adapted matrix", rank,
                "attach_lora",
            )  # fmt: skip


def check_pattern(
    pattern: Mapping[str, int] | None, parameter: str, targets: Sequence[str]
) -> None:
    """Refuse keys of rank and alpha patterns that match nothing that gets an adapter."""
    # Keys may be regular expressions, which end like the names they match.
    for key in pattern or {}:
        if not any(str(key).endswith(name.split(".")[-1]) for name in targets):
            raise ConfigError(
                f"{parameter}: {key!r} is none of the modules that get an adapter: "
                f"{', '.join(targets)}.{did_you_mean(str(key), targets)}"
            )


def _names_of(model: Any, kinds: type | tuple[type, ...], *, leave_out: Any = None) -> list[str]:
    """Last parts of the names of modules of some kinds, the usual seven projections first."""
    names = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not leave_out
    } - {"", *(str(index) for index in range(len(list(model.modules()))))}
    ordered = [name for name in DEFAULT_TARGET_MODULES if name in names]
    return ordered + sorted(names - set(ordered))
