"""What the stages ask of an engine and of its trainer.

An engine knows how to put a model into memory, attach an adapter and run both. Rows, manifests
and export formats are not its concern. What an engine's author needs besides can be imported from
here: :class:`TrainerBase`, :func:`make_adapted`, :func:`attach_saved_adapter`,
:func:`settle_stop_tokens` and :func:`inference_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.engines.inference import inference_mode
from qlora_kit.engines.peft_model import attach_saved_adapter, make_adapted, settle_stop_tokens
from qlora_kit.engines.trainer_mixins import TrainerBase
from qlora_kit.handles import AdaptedModel, LoadedModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, TrainerCallback
    from trl import SFTConfig

__all__ = [
    "DecodingEngine",
    "DecodingSession",
    "Engine",
    "GenerativeModel",
    "QuietEngine",
    "StepPlan",
    "TrainJob",
    "Trainer",
    "TrainerBase",
    "attach_saved_adapter",
    "inference_mode",
    "make_adapted",
    "settle_stop_tokens",
]


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
        compute_metrics: transformers' function of predictions and labels, or ``None``.
    """

    args: SFTConfig
    train_dataset: Any
    eval_dataset: Any
    collator: Any
    is_packed: bool
    callbacks: Sequence[Any] = ()
    plan: Any = None
    chooses_checkpointing: bool = False
    compute_metrics: Any = None


class StepPlan(Protocol):
    """What a trainer that computes its own steps decided; ``str`` of it goes into the result."""

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens that go through the model at once."""
        ...

    @property
    def caches_weights(self) -> bool:
        """Whether dequantized weights are kept."""
        ...

    @property
    def predicted_bytes(self) -> int:
        """Predicted peak memory beyond the loaded model."""
        ...


class Trainer(Protocol):
    """What training asks of an engine's trainer, checked before the first step.

    transformers' ``Trainer`` has the first half; :class:`TrainerBase` adds the other one, so that
    ``class MyTrainer(TrainerBase, SFTTrainer)`` has all of it.

    Attributes:
        args: The configuration it trains with.
        state: transformers' ``TrainerState``: steps done and to do, and the log.
        control: transformers' ``TrainerControl``.
        callback_handler: Holds the callbacks in ``callbacks``.
        step_losses: Mean loss per trained token of each optimizer step begun in this process.
        tokens_seen: Tokens of the micro-batches taken, padding excluded.
        trained_tokens: Of those, the tokens whose prediction carried loss.
        uses_fast_step: Whether the trainer computes steps itself, which then have a plan.
        while_saving: Training sets it to what is entered while a checkpoint is written, so that
            no signal tears one apart.
        fast_plan: That plan, from the first step until ``release``; ``None`` otherwise.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    while_saving: Callable[[], AbstractContextManager[Any]]

    @property
    def step_losses(self) -> Sequence[float]: ...

    @property
    def tokens_seen(self) -> int: ...

    @property
    def trained_tokens(self) -> int: ...

    @property
    def uses_fast_step(self) -> bool: ...

    @property
    def fast_plan(self) -> StepPlan | None: ...

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """Train to the end, or until a callback stops it."""
        ...

    def add_callback(self, callback: TrainerCallback) -> None:
        """Tell one more callback of every event."""
        ...

    def remove_callback(self, callback: TrainerCallback) -> None:
        """Tell a callback nothing any more."""
        ...

    def is_world_process_zero(self) -> bool:
        """Whether this process, of several that train together, writes the files."""
        ...

    def save_checkpoint(self) -> bool:
        """Write ``checkpoint-STEP`` for the steps done; whether there were any to save."""
        ...

    def release(self) -> None:
        """Take off the model what training put on it, and free what it allocated."""
        ...


class GenerativeModel(Protocol):
    """A model that generates: transformers' ``generate`` and forward pass."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids, as transformers' ``GenerationMixin.generate`` takes and returns them."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass, whose result has ``logits``."""
        ...


@runtime_checkable
class Engine(Protocol):
    """How a model is loaded, adapted, trained and run.

    An engine whose libraries print may have a method ``quietly`` besides, see
    :class:`QuietEngine`.

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

    def make_trainer(self, model: AdaptedModel, job: TrainJob) -> Trainer:
        """A trainer, not yet started."""
        ...

    def inference(self, model: LoadedModel) -> AbstractContextManager[GenerativeModel]:
        """The model ready to generate; on exit it is in the mode it was found in."""
        ...


class DecodingSession(Protocol):
    """Answers being written by an engine's own decoder."""

    def answer(self, prompts: Iterator[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Tokens as they come, each with the number of the prompt that it answers.

        An answer ends with one of the configuration's end tokens, after ``max_new_tokens``, or
        after :meth:`finish`. Prompts are taken as there is room for them.
        """
        ...

    def finish(self, index: int) -> None:
        """Write no more of an answer."""
        ...


@runtime_checkable
class DecodingEngine(Engine, Protocol):
    """An engine that has a way of its own to write answers, for the models it covers."""

    def decode(
        self,
        model: LoadedModel,
        config: GenerationConfig,
        *,
        seed: int | None,
        most_tokens: int,
        at_once: int,
    ) -> AbstractContextManager[DecodingSession | str]:
        """A session, or why this model or these settings are left to ``generate``.

        Args:
            model: In inference mode.
            config: Complete.
            seed: Makes sampling repeatable.
            most_tokens: Tokens of the longest prompt together with its answer.
            at_once: Answers that are wanted at the same time.
        """
        ...


@runtime_checkable
class QuietEngine(Engine, Protocol):
    """An engine that can keep what its libraries print off standard output."""

    def quietly(self) -> AbstractContextManager[Any]:
        """Log what they print meanwhile."""
        ...
