"""Checkpoints of earlier runs in an output folder, which are kept apart from a new run's."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from qlora_kit import ranks
from qlora_kit.boundaries import describe_cause
from qlora_kit.errors import TrainingError
from qlora_kit.manifest import MANIFEST_NAME, read_manifest
from qlora_kit.messages import Setting
from qlora_kit.report import REPORT_NAME
from qlora_kit.training.checkpoint import EARLIER_PREFIX, Checkpoint, list_checkpoints
from qlora_kit.training.identity import RunIdentity
from qlora_kit.training.resumption import Resumption

__all__ = ["set_apart"]

logger = logging.getLogger(__name__)


def set_apart(folder: Path, resumption: Resumption, identity: RunIdentity) -> Resumption:
    """Move other runs' checkpoints into folders of their own, with their manifest and report.

    What lies directly in an output folder is then of one run: none is overwritten by a step of the
    same number, and none is taken for the new run's.

    Args:
        folder: The output folder, which this process holds.
        resumption: How the run that begins there begins. Every rank must ask.
        identity: What that run is made of.

    Returns:
        The same, with its checkpoint where it is now.

    Raises:
        TrainingError: When they cannot be moved.
    """
    moved = ranks.share("earlier runs", lambda: _move_others(folder, resumption.run_id, identity))
    resumed = resumption.checkpoint
    if resumed is None or resumed.path.resolve() not in moved:
        return resumption
    return dataclasses.replace(resumption, checkpoint=Checkpoint(moved[resumed.path.resolve()]))


def _move_others(folder: Path, run_id: str, identity: RunIdentity) -> dict[Path, Path]:
    """Where each checkpoint was, with its links resolved, and where it is now."""
    # One that was being written when its run was killed is nobody's, and written over.
    others = [
        one for one in list_checkpoints(folder) if one.run_id != run_id and one.has_been_written
    ]
    moved = {}
    for other_id, found in itertools.groupby(others, key=lambda one: one.run_id):
        checkpoints = list(found)
        names = [one.path.name for one in checkpoints]
        target = _choose_target(folder, other_id or "unknown", names)
        if other_id is not None and _read_run_id(folder) == other_id:
            names += [name for name in (MANIFEST_NAME, REPORT_NAME) if (folder / name).is_file()]
        latest = checkpoints[0]
        is_same = latest.identity is not None and not latest.identity.find_differences(identity)
        try:
            target.mkdir(exist_ok=True)
            for name in names:
                before = (folder / name).resolve()
                os.replace(folder / name, target / name)
                moved[before] = target / name
        except OSError as error:
            raise TrainingError(
                f"{folder} holds another run's checkpoints ({', '.join(names[:5])}), which cannot "
                f"be moved to {target}: {describe_cause(error)} Give another output_dir."
            ) from error
        same = (
            " Its rows and settings are the same: %s goes on where it ended." if is_same else "%s"
        )
        logger.warning(
            f"%s held the checkpoints of %s (%s). They are in %s now.{same}",
            folder, f"another run, {other_id}" if other_id else "a run that they do not name",
            _list_names(one.path.name for one in checkpoints), target,
            Setting("resume_from_checkpoint", "auto") if is_same else "",
        )  # fmt: skip
    return moved


def _choose_target(folder: Path, run: str, names: list[str]) -> Path:
    """Where a run's checkpoints go: beside those that were moved before, not over them."""
    for number in itertools.count(1):
        target = folder / (
            f"{EARLIER_PREFIX}{run}" if number == 1 else f"{EARLIER_PREFIX}{run}-{number}"
        )
        if not any((target / name).exists() for name in names):
            return target
    raise AssertionError


def _read_run_id(folder: Path) -> object:
    """The run whose manifest lies in an output folder."""
    try:
        run = read_manifest(folder).get("run")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return run.get("id") if isinstance(run, dict) else None


def _list_names(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
