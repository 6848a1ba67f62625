"""What the libraries raise while a trainer is made and while it runs, in words of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qlora_kit.boundaries import (
    describe_cause,
    is_disk_full,
    is_foreign,
    is_out_of_memory,
    shown_cause,
)
from qlora_kit.engines.base import Trainer, TrainJob
from qlora_kit.engines.contract import make_trainer
from qlora_kit.errors import (
    ConfigError,
    MissingDependencyError,
    OfflineError,
    QloraKitError,
    TrainingError,
)
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Setting
from qlora_kit.training.memory import advise_on_memory

__all__ = ["explain_failure", "make_trainer_or_explain"]

_MISSING: Final = "This run needs a package that is not installed"


def make_trainer_or_explain(model: AdaptedModel, job: TrainJob) -> Trainer:
    """The engine's trainer; what transformers and TRL refuse becomes an error of ours."""
    try:
        return make_trainer(model.engine, model, job)
    except QloraKitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"Out of memory: {_first_line(error)}", advice=advise_on_memory(model, None)
            ) from error
        if isinstance(error, ImportError) or "to be installed" in str(error):
            raise MissingDependencyError(f"{_MISSING}: {error}") from error
        if isinstance(error, ConnectionError):
            raise OfflineError(
                f"The trainer wants the network, which is off: {describe_cause(error)} "
                "Drop push_to_hub."
            ) from shown_cause(error)
        if not is_foreign(error):
            raise
        raise ConfigError(
            f"The trainer refuses these settings: {describe_cause(error)}"
        ) from shown_cause(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def explain_failure(
    error: Exception, model: AdaptedModel, trainer: Trainer, folder: Path
) -> QloraKitError:
    """What the libraries raised in mid-run, with what is left of the run."""
    if isinstance(error, ImportError):
        return MissingDependencyError(f"{_MISSING}: {error}")
    if is_out_of_memory(error):
        return TrainingError(
            f"Out of memory: {_first_line(error)} The batch was not changed.",
            advice=advise_on_memory(model, trainer),
        )
    step = trainer.state.global_step
    is_full = is_disk_full(error)
    what = f"the disk of {folder} is full" if is_full else describe_cause(error)
    advice: tuple[str | Setting, ...] = (
        f"({describe_cause(error)}) Free some of it, or save less often. "
        if is_full
        else "Look at the setting that it is about. ",
        "Where a checkpoint was saved, ",
        Setting("resume_from_checkpoint", True),
        " goes on from it.",
    )
    return TrainingError(f"Training stopped after step {step}: {what.rstrip('.')}.", advice=advice)
