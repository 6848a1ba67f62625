"""Inference mode that several readers of one model share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

from qlora_kit.engines.modules import list_modules
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
        _end_training(model)
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
    parts = list_modules(model)
    training = [part for part in parts if part.training]
    # Training may begin after the first reader came, and go on when this one leaves.
    if earlier is not None and not training and _uses_cache(model):
        return earlier
    checkpointing = [
        (part, part.gradient_checkpointing)
        for part in parts
        if vars(part).get("gradient_checkpointing")
    ]
    # What training does not touch is still as an earlier reader left it.
    max_length = earlier.max_length if earlier else model.generation_config.max_length
    padding_side = earlier.padding_side if earlier else tokenizer.padding_side
    use_cache = _uses_cache(model)
    if earlier is not None and use_cache:  # an earlier reader's doing
        use_cache = earlier.use_cache
    return _Found(training, checkpointing, use_cache, max_length, padding_side)


def _end_training(model: Any) -> None:
    """``model.eval()``, which takes long in a model of thousands of modules."""
    from torch.nn import Module
    from transformers import PreTrainedModel

    training = [part for part in list_modules(model) if part.training]
    usual = {Module.train, PreTrainedModel.train}
    if any(type(part).train not in usual or vars(part).get("use_kernels") for part in training):
        model.eval()
    for part in training:
        vars(part)["training"] = False  # ten times as fast as Module's own way


def _put_back(model: Any, tokenizer: Any, found: _Found) -> None:
    model.config.get_text_config().use_cache = found.use_cache
    model.generation_config.max_length = found.max_length
    tokenizer.padding_side = found.padding_side
    for part in found.training:
        vars(part)["training"] = True
    for part, value in found.checkpointing:
        part.gradient_checkpointing = value


def _uses_cache(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "use_cache", True))
