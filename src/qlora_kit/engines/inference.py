"""Inference mode that several readers of one model share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

from qlora_kit.engines.readers import Readers

__all__ = ["inference_mode"]


@dataclasses.dataclass(eq=False)
class _Found:
    """How the first reader found the model."""

    # By module: a new adapter trains inside a base that was loaded for evaluation.
    training: list[Any]
    checkpointing: list[tuple[Any, Any]]
    use_cache: bool
    max_length: int | None
    padding_side: str


_readers: Final[Readers[_Found]] = Readers()


def inference_mode(
    model: Any, tokenizer: Any, *, switch: Callable[[Any], object] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Eval mode with the key/value cache on; the last reader to leave puts everything back.

    Args:
        model: A transformers or peft model.
        tokenizer: Its tokenizer, whose padding side is put back as well.
        switch: What else an engine does with a model that is to generate.
    """

    def prepare() -> None:
        if switch is not None:
            switch(model)
        model.eval()
        # A model of images and text keeps this in the configuration of its text model.
        model.config.get_text_config().use_cache = True
        # Answers are limited by max_new_tokens; transformers warns of every limit beside it.
        model.generation_config.max_length = None

    return _readers.reading(
        model,
        functools.partial(_look_at, model, tokenizer),
        functools.partial(_put_back, model, tokenizer),
        prepare,
    )


def _look_at(model: Any, tokenizer: Any, earlier: _Found | None) -> _Found:
    training = [part for part in model.modules() if part.training]
    # Training may begin after the first reader came, and go on when this one leaves.
    if earlier is not None and not training and _uses_cache(model):
        return earlier
    checkpointing = [
        (part, part.gradient_checkpointing)
        for part in model.modules()
        if vars(part).get("gradient_checkpointing")
    ]
    # What training does not touch is still as an earlier reader left it.
    max_length = earlier.max_length if earlier else model.generation_config.max_length
    padding_side = earlier.padding_side if earlier else tokenizer.padding_side
    use_cache = _uses_cache(model)
    if earlier is not None and use_cache:  # an earlier reader's doing
        use_cache = earlier.use_cache
    return _Found(training, checkpointing, use_cache, max_length, padding_side)


def _put_back(model: Any, tokenizer: Any, found: _Found) -> None:
    model.config.get_text_config().use_cache = found.use_cache
    model.generation_config.max_length = found.max_length
    tokenizer.padding_side = found.padding_side
    for part in found.training:
        part.training = True
    for part, value in found.checkpointing:
        part.gradient_checkpointing = value


def _uses_cache(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "use_cache", True))
