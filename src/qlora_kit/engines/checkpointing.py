"""Activation checkpointing, which the libraries spell in two ways.

transformers 5.24 calls it ``activation_checkpointing`` and warns of the older name,
``gradient_checkpointing``, which 5.17 has alone. Both are taken here; inside this library settings
carry the older one, which every supported version reads.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from qlora_kit.errors import ConfigError
from qlora_kit.messages import Setting

__all__ = [
    "SPELLINGS",
    "disable_checkpointing",
    "is_checkpointing",
    "spell_as_installed",
    "unify_spellings",
    "without_checkpointing",
]

#: The newer names, and the older ones that settings carry here.
SPELLINGS: Final[Mapping[str, str]] = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def unify_spellings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``SFTConfig`` with both spellings under one name; ``None`` counts as not given.

    Raises:
        ConfigError: When both are given and say different things.
    """
    unified = dict(fields)
    for newer, older in SPELLINGS.items():
        given = {name: unified.pop(name) for name in (newer, older) if name in unified}
        values = [value for value in given.values() if value is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ConfigError(
                Setting(newer, values[0], "train_sft"),
                " and ",
                Setting(older, values[1], "train_sft"),
                " are two names of one setting. Give one of them.",
                parameter=newer,
                value=values[0],
            )
        if values:
            unified[older] = values[0]
    return unified


def spell_as_installed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields under the names that the installed ``SFTConfig`` prefers."""
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)}
    preferred = {older: newer for newer, older in SPELLINGS.items() if newer in known}
    return {preferred.get(name, name): value for name, value in fields.items()}


def without_checkpointing(args: Any) -> Any:
    """A copy of a trainer's arguments that asks for no checkpointing, under either name."""
    args = copy.copy(args)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(args, name):
            setattr(args, name, False)
    return args


def is_checkpointing(model: Any) -> bool:
    """Whether any part of a model recomputes its activations."""
    return any(vars(part).get("gradient_checkpointing") for part in model.modules())


def disable_checkpointing(model: Any) -> None:
    """Turn it off in a transformers model, through whichever method it has."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
