"""Parameters that take an adapter of their own, as no linear layer holds them: stacked experts.

peft's ``target_parameters`` matches names by their ends and warns where nothing matches; here they
are held against the model before anything is attached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qlora_kit.errors import ConfigError, did_you_mean
from qlora_kit.messages import Setting

__all__ = ["EXPERTS", "find_parameters", "list_expert_stacks", "resolve_parameters"]

#: Stands for every stack of experts.
EXPERTS: Final = "experts"
_BEFORE_LAYERS: Final = re.compile(r"^.*?\.\d+\.")


def find_parameters(model: Any) -> dict[str, Any]:
    """Matrices and stacks of matrices outside of linear layers and embeddings, by full name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    modules = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    return {
        # An adapter that is there already wraps the module, not the parameter.
        f"{path.replace('.base_layer', '')}.{name}": parameter
        for path, module in model.named_modules()
        if not isinstance(module, modules)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and not name.endswith("bias")
    }


def list_expert_stacks(model: Any) -> list[str]:
    """Names that a model's stacks of experts have in every layer, ``mlp.experts.down_proj``."""
    found = find_parameters(model)
    stacks = (name for name, one in found.items() if one.dim() == 3 and "expert" in name)
    return list(dict.fromkeys(_shorten(name) for name in stacks))


def resolve_parameters(asked: Any, model: Any) -> tuple[str, ...] | None:
    """What was asked for, as names that end those of this model's parameters.

    Args:
        asked: Names, or ``"experts"``.
        model: The base.

    Raises:
        ConfigError: For what is no name of a parameter that an adapter can change.
    """
    if asked is None:
        return None
    known = find_parameters(model)
    available = list(dict.fromkeys(_shorten(name) for name in known))
    has = f" This model has: {', '.join(available) or 'none'}."
    names = (asked,) if isinstance(asked, str) else asked
    if not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise _refuse("must be names of parameters, or 'experts' for all stacks", asked, has)
    names = tuple(dict.fromkeys(names))
    if EXPERTS in names:
        stacks = list_expert_stacks(model)
        if not stacks:
            raise ConfigError(
                "target_parameters='experts': this model holds no experts in stacks. Adapters of "
                "its linear layers are what target_modules names."
            )
        names = tuple(dict.fromkeys([*(one for one in names if one != EXPERTS), *stacks]))
    if not names:
        raise _refuse("is empty; leave it out to adapt modules alone", asked, has)
    unknown = [
        name
        for name in names
        if not isinstance(name, str) or not any(f".{one}".endswith(f".{name}") for one in known)
    ]
    if not unknown:
        return names
    raise ConfigError(
        f"target_parameters: this model has no {', '.join(map(repr, unknown))} outside of its "
        f"linear layers.{_hint(unknown, available)}{has} Adapters of linear layers are what "
        "target_modules names."
    )


def _hint(unknown: Iterable[Any], available: Iterable[str]) -> str:
    known = {one: one for one in available} | {one.rsplit(".", 1)[-1]: one for one in available}
    return "".join(dict.fromkeys(did_you_mean(str(name), (*known, EXPERTS)) for name in unknown))


def _refuse(why: str, asked: Any, has: str) -> ConfigError:
    return ConfigError(
        Setting("target_parameters", of="attach_lora"),
        f" {why}; got {asked!r}.{has}",
        parameter="target_parameters",
        value=asked,
    )


def _shorten(name: str) -> str:
    """A parameter's name within its layer."""
    return _BEFORE_LAYERS.sub("", name)
