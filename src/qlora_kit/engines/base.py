"""What the stages ask of an engine.

An engine knows how to put a model into memory, attach an adapter and run both. Rows, manifests
and export formats are not its concern.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.handles import AdaptedModel, LoadedModel

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

__all__ = ["Engine", "TrainJob", "quietly"]


@dataclass(frozen=True)
class TrainJob:
    """A training run, ready for an engine's trainer.

    Attributes:
        args: The complete trainer configuration.
        train_dataset: Rows with ``input_ids`` and ``labels`` (and ``seq_lengths`` when packed).
        eval_dataset: The same, a dictionary of them, or ``None``.
        collator: Turns rows into a batch.
        is_packed: Whether a row of a batch holds several examples: packed or padding-free.
        callbacks: Trainer callbacks.
        plan: How steps are computed, for engines that have a choice; ``None`` lets them choose.
        chooses_checkpointing: Whether ``args.gradient_checkpointing`` is a mere default, which
            the engine may overrule.
    """

    args: SFTConfig
    train_dataset: Any
    eval_dataset: Any
    collator: Any
    is_packed: bool
    callbacks: Sequence[Any] = ()
    plan: Any = None
    chooses_checkpointing: bool = False


@runtime_checkable
class Engine(Protocol):
    """How a model is loaded, adapted, trained and run.

    Attributes:
        name: What users type for ``engine=`` and what logs and manifests say.
    """

    name: str

    def load(self, config: LoadConfig) -> LoadedModel:
        """Put a base model into memory."""
        ...

    def attach(self, loaded: LoadedModel, config: AdapterConfig) -> AdaptedModel:
        """Attach a new LoRA adapter."""
        ...

    def attach_saved(
        self, loaded: LoadedModel, folder: Path, *, is_trainable: bool
    ) -> AdaptedModel:
        """Attach an adapter that peft saved in ``folder``."""
        ...

    def make_trainer(self, model: AdaptedModel, job: TrainJob) -> SFTTrainer:
        """A trainer, not yet started."""
        ...

    def inference(self, model: LoadedModel) -> AbstractContextManager[Any]:
        """The model ready to generate; on exit it is in the mode it was found in."""
        ...


def quietly(engine: Engine) -> AbstractContextManager[Any]:
    """Keep what an engine's libraries print off standard output, if it has a way.

    Args:
        engine: One that may have a method ``quietly``, which returns a context manager.
    """
    context: AbstractContextManager[Any] = getattr(engine, "quietly", nullcontext)()
    return context
