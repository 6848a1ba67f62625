"""Which checkpoint a run goes on from: a whole one, and one of the same run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from qlora_kit.boundaries import describe_cause
from qlora_kit.engines.adapter_start import read_start
from qlora_kit.errors import ConfigError, invalid_value
from qlora_kit.handles import AdaptedModel
from qlora_kit.manifest import MANIFEST_NAME
from qlora_kit.messages import Setting
from qlora_kit.paths import expand_path
from qlora_kit.training.checkpoint import (
    CHECKPOINT_PREFIX,
    Checkpoint,
    list_checkpoints,
    list_set_apart,
)
from qlora_kit.training.identity import RunIdentity

__all__ = [
    "Resumption",
    "choose_checkpoint",
    "find_checkpoints",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Resumption:
    """How a run begins.

    Attributes:
        run_id: Its id: that of the run it goes on with, or a new one.
        checkpoint: What it goes on from, or ``None``.
        changes: What is not as it was in the checkpoint's run.
    """

    run_id: str
    checkpoint: Checkpoint | None = None
    changes: tuple[str, ...] = ()


def find_checkpoints(
    asked: bool | str | os.PathLike[str] | None, folder: Path, model: AdaptedModel | None
) -> list[Checkpoint]:
    """What ``resume_from_checkpoint`` may mean, the best first; nothing for a new run.

    Args:
        asked: ``None`` or ``False`` for none, ``True`` for the last whole one in ``folder``,
            ``"auto"`` for the same where there is one, or a path.
        folder: The run's output folder; earlier runs' that were set apart in it come last.
        model: What is to train on; the checkpoint's adapter must be of its shape. ``None``
            before it is loaded.

    Raises:
        ConfigError: When there is no checkpoint, or it is damaged or of another adapter.
    """
    if asked is None or asked is False:
        return []
    if asked is not True and not isinstance(asked, str | os.PathLike):
        raise invalid_value("resume_from_checkpoint", "must be True or a path, or 'auto'", asked)
    if asked is not True and asked != "auto":
        return [_take_one(expand_path(asked), folder, model)]
    found = [*list_checkpoints(folder), *list_set_apart(folder)]
    whole = _pass_over_damaged(found)
    if not whole and asked is True:
        raise ConfigError(
            Setting("resume_from_checkpoint", True),
            f", but {folder} holds no whole {CHECKPOINT_PREFIX}N folder.",
            *(f" Of {one.path.name}: {one.damage}." for one in found[:1]),
            parameter="resume_from_checkpoint",
            value=True,
        )
    if whole and model is not None and asked is True:
        _check_adapter(whole[0].path, model)
    return whole


def choose_checkpoint(
    found: Sequence[Checkpoint],
    asked: bool | str | os.PathLike[str] | None,
    identity: RunIdentity,
    new_id: str,
    *,
    takes_changes: bool,
) -> Resumption:
    """The checkpoint that this run goes on from, proven to be of this run, said in the log.

    Args:
        found: What :func:`find_checkpoints` found.
        asked: What ``resume_from_checkpoint`` was.
        identity: What the run is made of.
        new_id: Its id, where it does not go on with another.
        takes_changes: Whether another run's checkpoint will do.

    Raises:
        ConfigError: When there is none of this run, with what is different.
    """
    refused: list[tuple[Checkpoint, list[str]]] = []
    for one in found:
        if one.damage is not None:
            continue
        known = one.identity
        changes = [] if known is None else known.find_differences(identity)
        is_named = asked is not True and asked != "auto"
        if takes_changes or (not changes and (one.is_proven or is_named)):
            _pass_over_others(refused)
            _refuse_other_state(one, changes, identity)
            return _go_on(one, changes, new_id)
        refused.append((one, changes))
    if asked == "auto":
        _pass_over_others(refused)
        logger.info("resume_from_checkpoint='auto': a new run, %s.", new_id)
        return Resumption(new_id)
    if refused:
        one, changes = refused[0]
        if not one.is_proven and not changes:
            raise ConfigError(
                f"{one.path} does not say whose run it is of (its {MANIFEST_NAME} is missing, "
                "damaged or older). To go on from it: ",
                Setting("resume_from_checkpoint", str(one.path)),
                ".",
                parameter="resume_from_checkpoint",
            )
        raise ConfigError(
            f"{one.path} is another run's ({one.run_id}, step {one.step}): {', '.join(changes)}. "
            "Train without ",
            Setting("resume_from_checkpoint"),
            " to begin anew. To go on from it all the same, with what is asked for now: ",
            Setting("resume_with_changes", True),
            ".",
            parameter="resume_from_checkpoint",
        )
    return Resumption(new_id)


def _refuse_other_state(one: Checkpoint, changes: list[str], asked: RunIdentity) -> None:
    """Refuse changes that the saved optimizer and schedule cannot take over."""
    held = ["optim "]
    # These learn their rate as they go, and would go on with the checkpoint's.
    if str(asked.arguments.get("lr_scheduler_type")) in ("reduce_lr_on_plateau", "greedy"):
        held += ["learning_rate ", "lr_scheduler"]
    kept = [change for change in changes if change.startswith(tuple(held))]
    if kept:
        raise ConfigError(
            f"{one.path} holds the state of another optimizer or schedule: {', '.join(kept)}. "
            "It cannot be taken over: train with the same one, or without ",
            Setting("resume_from_checkpoint"),
            ".",
            parameter="resume_from_checkpoint",
        )


def _go_on(one: Checkpoint, changes: list[str], new_id: str) -> Resumption:
    run_id = new_id if changes or one.run_id is None else one.run_id
    logger.info("Run %s goes on from %s, at step %d.", run_id, one.path, one.step)
    if changes:
        logger.warning(
            "Going on from %s, which another run (%s) saved. From here on: %s.",
            one.path, one.run_id, ", ".join(changes),
        )  # fmt: skip
    elif not one.is_proven:
        logger.warning(
            "%s does not say whose run it is of, so that nobody can tell whether its rows and "
            "settings were these.", one.path,
        )  # fmt: skip
    if not one.has_optimizer:
        logger.warning(
            "%s holds no optimizer state (save_only_model=True leaves it out): the optimizer's "
            "moments begin anew, the learning rate goes on at its step.", one.path,
        )  # fmt: skip
    return Resumption(run_id, one, tuple(changes))


def _pass_over_others(refused: Sequence[tuple[Checkpoint, list[str]]]) -> None:
    for one, changes in refused:
        logger.warning(
            "%s is passed over, being another run's (%s): %s.",
            one.path, one.run_id or "it does not say which", ", ".join(changes) or "unknown",
        )  # fmt: skip


def _pass_over_damaged(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that may be whole, the first of them surely; the others are looked at when needed."""
    for index, one in enumerate(found):
        if one.damage is None:
            return list(found[index:])
        logger.warning("%s is passed over: %s.", one.path, one.damage)
    return []


def _take_one(path: Path, folder: Path, model: AdaptedModel | None) -> Checkpoint:
    one = Checkpoint(path)
    if one.damage is not None:
        names = ", ".join(other.path.name for other in list_checkpoints(folder)) or "none"
        raise ConfigError(
            Setting("resume_from_checkpoint", str(path)),
            f" is not a whole checkpoint: {one.damage}. Use another one. Checkpoints in {folder}: "
            f"{names}.",
            parameter="resume_from_checkpoint",
            value=str(path),
        )
    if model is not None:
        _check_adapter(path, model)
    return one


def _check_adapter(path: Path, model: AdaptedModel) -> None:
    """Refuse another adapter: peft would load what fits and leave the rest as it is."""
    config = path / "adapter_config.json"
    if not config.is_file():
        return
    try:
        saved = dict(json.loads(config.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{config} cannot be read: {describe_cause(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{config} is damaged: {error}. Use another checkpoint.") from error
    live = model.model.peft_config["default"]
    for name, mine in (
        ("r", live.r),
        ("lora_alpha", live.lora_alpha),
        ("target_modules", live.target_modules),
        ("target_parameters", live.target_parameters or []),
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
    start = read_start(path)
    if start is not None and (model.start is None or model.start.digest != start.digest):
        raise ConfigError(
            f"The adapter in {path} belongs to a base that its start changed, and this adapter's "
            "start made another one of it: ",
            Setting("random_state", start.random_state, "attach_lora"),
            " and the same machine would repeat it.",
            parameter="resume_from_checkpoint",
            advice=("Load the checkpoint itself with load_quantized, and go on with that model.",),
        )


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, set | list | tuple) else value
