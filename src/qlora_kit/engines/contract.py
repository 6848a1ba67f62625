"""What an engine gives, held to what the protocols in ``base`` promise.

Stages ask engines through here, so that an engine of another origin fails with what it lacks
rather than somewhere inside of a run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qlora_kit.engines import base
from qlora_kit.engines.base import (
    DecodingEngine,
    DecodingSession,
    Engine,
    GenerativeModel,
    QuietEngine,
    Trainer,
    TrainJob,
)
from qlora_kit.errors import EngineError
from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.import_noise import without_noise

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = [
    "check_handle",
    "find_missing",
    "make_trainer",
    "open_decoder",
    "quietly",
    "ready_to_generate",
]

_MISSING = object()

Handle = TypeVar("Handle", bound=LoadedModel)


def quietly(engine: Engine) -> AbstractContextManager[Any]:
    """Keep what an engine's libraries print off standard output, if it has a way."""
    return engine.quietly() if isinstance(engine, QuietEngine) else nullcontext()


def find_missing(value: object, protocol: type) -> list[str]:
    """The members of a protocol that an object lacks, or has as something that is no method."""
    missing = []
    for name in _list_members(protocol):
        # Looked up without running properties, which may wait for a device.
        found = inspect.getattr_static(value, name, _MISSING)
        if found is _MISSING and not hasattr(value, name):
            missing.append(name)
        elif inspect.isfunction(vars(protocol).get(name)) and not callable(getattr(value, name)):
            missing.append(f"{name}()")
    return missing


def _list_members(protocol: type) -> list[str]:
    return [
        name
        for part in reversed(protocol.__mro__)
        if part not in (object, Protocol) and part.__module__ == base.__name__
        for name in (*inspect.get_annotations(part), *vars(part))
        if not name.startswith("_")
    ]


def make_trainer(engine: Engine, model: AdaptedModel, job: TrainJob) -> Trainer:
    """The engine's trainer, which has all that training asks for.

    Raises:
        EngineError: When it lacks something; names all of it.
    """
    trainer = engine.make_trainer(model, job)
    missing = find_missing(trainer, Trainer)
    if missing:
        kind = type(trainer).__name__
        raise EngineError(
            f"Engine {engine.name!r} made a {kind} without {', '.join(missing)}. Derive its "
            "trainer from qlora_kit.engines.base.TrainerBase and trl.SFTTrainer, in this order: "
            "class MyTrainer(TrainerBase, SFTTrainer)."
        )
    return trainer


def check_handle(engine: Engine, method: str, value: object, kind: type[Handle]) -> Handle:
    """What an engine's method returned, if it is the handle that it should be.

    Args:
        engine: The engine.
        method: The method, for the message.
        value: What it returned.
        kind: ``LoadedModel`` or ``AdaptedModel``.

    Raises:
        EngineError: When it is something else.
    """
    if not isinstance(value, kind):
        raise EngineError(
            f"Engine {engine.name!r}: {method} returned {type(value).__name__}, and must return a "
            f"qlora_kit.{kind.__name__}."
        )
    return value


@contextlib.contextmanager
def ready_to_generate(model: LoadedModel) -> Iterator[GenerativeModel]:
    """The model in its engine's inference mode.

    Raises:
        EngineError: When what the engine yields cannot generate.
    """
    engine: Engine = model.engine
    with engine.inference(model) as ready:
        if not callable(getattr(ready, "generate", None)):
            raise EngineError(
                f"Engine {engine.name!r}: inference yields {type(ready).__name__}, which has no "
                "generate method. Yield the model itself, ready to generate."
            )
        # Compiling says what nobody here can act on.
        with without_noise():
            yield ready


def open_decoder(
    model: LoadedModel,
    config: GenerationConfig,
    *,
    seed: int | None,
    most_tokens: int,
    at_once: int = 1,
) -> AbstractContextManager[DecodingSession | str]:
    """The engine's own decoder at work, or why ``generate`` has to do.

    Args:
        model: In inference mode, see :func:`ready_to_generate`.
        config: As for :meth:`DecodingEngine.decode`, like the others.
        seed: The same.
        most_tokens: The same.
        at_once: The same.
    """
    engine: Engine = model.engine
    if not isinstance(engine, DecodingEngine):
        return nullcontext(f"engine {engine.name!r} has no decoder of its own")
    return engine.decode(model, config, seed=seed, most_tokens=most_tokens, at_once=at_once)
