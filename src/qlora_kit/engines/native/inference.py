"""Inference mode that several readers of one model share."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

__all__ = ["inference_mode"]


@dataclasses.dataclass(eq=False)
class _Found:
    """How the first reader found the model, and how many read it now."""

    # By module: a new adapter trains inside a base that was loaded for evaluation.
    training: list[Any]
    use_cache: bool
    had_checkpointing: bool
    readers: int = 0


_found: weakref.WeakKeyDictionary[Any, _Found] = weakref.WeakKeyDictionary()
# Reentrant: a forgotten stream is closed wherever the garbage collector happens to run.
_lock = threading.RLock()


@contextlib.contextmanager
def inference_mode(model: Any) -> Iterator[None]:
    """Eval mode with the key/value cache on; the last reader to leave puts both back.

    Args:
        model: A transformers or peft model.
    """
    with _lock:
        training = [part for part in model.modules() if part.training]
        found = _found.get(model)
        # Training began since the first reader came, and goes on when this one leaves.
        if found is None or training or not model.config.use_cache:
            found = _found[model] = _Found(
                training,
                model.config.use_cache,
                getattr(model, "is_gradient_checkpointing", False),
            )
        found.readers += 1
        model.eval()
        model.config.use_cache = True
    try:
        yield
    finally:
        with _lock:
            found.readers -= 1
            if found.readers == 0:
                if _found.get(model) is found:
                    del _found[model]
                _put_back(model, found)


def _put_back(model: Any, found: _Found) -> None:
    model.config.use_cache = found.use_cache
    for part in found.training:
        part.training = True
    if found.had_checkpointing and not model.is_gradient_checkpointing:
        model.gradient_checkpointing_enable()
