"""Checkpoints of a run: which one to go on from, and whether it fits.

The trainer writes them; this module only looks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import ConfigError
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Setting

__all__ = ["CHECKPOINT_PREFIX", "Checkpoint", "find_checkpoint"]

CHECKPOINT_PREFIX = "checkpoint-"

# The last file that the trainer writes: without it a checkpoint is not whole.
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from, and the optimizer steps done when it was saved."""

    path: Path
    step: int


def find_checkpoint(
    asked: bool | str | os.PathLike[str] | None, folder: Path, model: AdaptedModel | None
) -> Checkpoint | None:
    """What ``resume_from_checkpoint`` means.

    Args:
        asked: ``None`` or ``False`` for none, ``True`` for the last whole one in ``folder``, or
            a path.
        folder: The run's output folder.
        model: What is to train on; the checkpoint's adapter must be of its shape. ``None``
            before it is loaded.

    Raises:
        ConfigError: When there is no checkpoint, or it is incomplete or of another adapter.
    """
    if asked is None or asked is False:
        return None
    found = sorted(
        (
            path
            for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
            if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
        ),
        key=lambda path: int(path.name.removeprefix(CHECKPOINT_PREFIX)),
    )
    # One that was cut off while it was written is passed over.
    whole = [path for path in found if (path / _STATE).is_file()]
    if asked is True:
        if not whole:
            raise ConfigError(
                Setting("resume_from_checkpoint", True, "train_sft"),
                f", but {folder} holds no whole {CHECKPOINT_PREFIX}N folder.",
                parameter="resume_from_checkpoint",
                value=True,
            )
        path = whole[-1]
    elif isinstance(asked, str | os.PathLike):
        path = Path(asked).expanduser()
    else:
        raise ConfigError(
            Setting("resume_from_checkpoint", of="train_sft"),
            f" must be True or a path, got {asked!r}.",
            parameter="resume_from_checkpoint",
            value=asked,
        )
    if not (path / _STATE).is_file():
        names = ", ".join(path.name for path in whole) or "none"
        raise ConfigError(
            Setting("resume_from_checkpoint", str(path), "train_sft"),
            f" is not a checkpoint folder (it has no {_STATE}). Checkpoints in {folder}: {names}.",
            parameter="resume_from_checkpoint",
            value=str(path),
        )
    if model is not None:
        _check_adapter(path, model)
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, int(state["global_step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path / _STATE} is damaged: {error}. Use another one.") from error


def _check_adapter(path: Path, model: AdaptedModel) -> None:
    """Refuse another adapter: peft would load what fits and leave the rest as it is."""
    config = path / "adapter_config.json"
    if not config.is_file():
        return
    try:
        saved = dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config} is damaged: {error}. Use another checkpoint.") from error
    live = model.model.peft_config["default"]
    for name, mine in (
        ("r", live.r),
        ("lora_alpha", live.lora_alpha),
        ("target_modules", live.target_modules),
        ("use_dora", live.use_dora),
        ("use_rslora", live.use_rslora),
    ):
        other = saved.get(name)
        if other is not None and _comparable(mine) != _comparable(other):
            raise ConfigError(
                f"{path} was trained with ",
                Setting(name, other, "attach_lora"),
                f" and this adapter has {mine!r}.",
                parameter=name,
                value=mine,
                advice=(
                    "Attach the adapter as it was, or train without ",
                    Setting("resume_from_checkpoint"),
                    ".",
                ),
            )


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, set | list | tuple) else value
