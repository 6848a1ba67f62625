"""What an optimizer reads of the options it is given.

Asked of transformers itself, which has a function of its own for each of fifty optimizers: what
changes nothing of what it is made with was not read.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from qlora_kit.errors import ConfigError
from qlora_kit.messages import Setting

__all__ = ["check_optimizer_options", "find_unread_options", "reads_option"]


def check_optimizer_options(fields: Mapping[str, Any]) -> None:
    """Refuse ``optim_args`` that the optimizer does not read, or cannot.

    Raises:
        ConfigError: At the first of them.
    """
    text = fields.get("optim_args")
    if not text:
        return
    name = _word(fields.get("optim") or "adamw_8bit")
    parts = [part.split("=") for part in str(text).replace(" ", "").split(",")]
    if any(len(part) != 2 or not all(part) for part in parts):
        raise ConfigError(
            Setting("optim_args", text),
            " must be names and values, such as 'momentum=0.9,nesterov=true'.",
            parameter="optim_args",
            value=text,
        )
    asked = types.SimpleNamespace(
        optim=name, optim_args=text, learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, optim_target_modules=fields.get("optim_target_modules"),
    )  # fmt: skip
    # Its package is not installed, or it wants the model: the trainer will say so.
    if isinstance(_make_settings(asked, optim_args=None), Exception):
        return
    made = _make_settings(asked)
    if isinstance(made, Exception):
        raise ConfigError(
            Setting("optim_args", text),
            f" does not go with the optimizer {name!r}: {made}.",
            parameter="optim_args",
            value=text,
        ) from made
    unread = find_unread_options(asked)
    if unread:
        raise ConfigError(
            Setting("optim_args", text),
            f": the optimizer {name!r} reads no {', '.join(map(repr, unread))}. Leave it out, or "
            "name another optimizer: optim='sgd' reads momentum, dampening and nesterov.",
            parameter="optim_args",
            value=text,
        )


def find_unread_options(args: Any) -> list[str]:
    """Names in ``optim_args`` that make no difference to what the optimizer is made with."""
    if not args.optim_args:
        return []
    given = dict(part.split("=") for part in args.optim_args.replace(" ", "").split(","))
    made = _make_settings(args)
    unread = []
    for name, value in given.items():
        # Left out, or something else: where both change nothing, nobody reads it.
        others = [
            ",".join(f"{one}={text}" for one, text in {**given, name: new}.items() if text)
            for new in ("", _change(value))
        ]
        if all(_is_same(made, _make_settings(args, optim_args=one)) for one in others):
            unread.append(name)
    return unread


def reads_option(args: Any, name: str) -> bool:
    """Whether a number among the arguments makes a difference to the optimizer that runs."""
    made = _make_settings(args)
    return not _is_same(made, _make_settings(args, **{name: getattr(args, name) / 2 + 1e-9}))


def _make_settings(args: Any, **changes: Any) -> Any:
    """The optimizer's class and settings, or what transformers raised over them."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    names = (
        "optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon",
        "optim_target_modules",
    )  # fmt: skip
    asked = {name: getattr(args, name) for name in names} | changes
    asked["optim"] = OptimizerNames(_word(asked["optim"]))
    try:
        return Trainer.get_optimizer_cls_and_kwargs(types.SimpleNamespace(**asked))
    # Each optimizer reads its options with code of its own.
    except Exception as error:  # noqa: BLE001
        return error


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return type(one) is type(other)
    return bool(one == other)


def _change(value: str) -> str:
    """Another value of the same kind."""
    if value.lower() in ("true", "false"):
        return "false" if value.lower() == "true" else "true"
    try:
        return str(float(value) / 2 + 1)
    except ValueError:
        return f"{value}x"


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
