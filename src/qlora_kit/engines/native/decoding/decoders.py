"""Finding a model's decoder, or making one; and what memory it may keep."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final

from qlora_kit.device import measure_free_bytes
from qlora_kit.engines.native.decoding.decoder import Decoder
from qlora_kit.engines.native.decoding.kv_cache import measure_slot_bytes
from qlora_kit.engines.native.decoding.model_layers import read_model, sign_model
from qlora_kit.engines.native.decoding.session import DecodingSession, Slots
from qlora_kit.engines.native.decoding.support import (
    find_decoding_obstacle,
    find_settings_obstacle,
)

__all__ = ["begin_training", "end_training", "open_session", "release_decoder"]

logger = logging.getLogger(__name__)

#: Capacities are rounded up to this, so that prompts of similar length share memory and graphs.
_CAPACITY_STEP: Final = 256

#: Share of the free memory that keys and values of several answers may take.
_CACHE_SHARE: Final = 0.4


class _Kept:
    """A decoder, what it was read from, and slots that nobody uses."""

    def __init__(self, decoder: Decoder, signature: object) -> None:
        self.decoder, self.signature = decoder, signature
        self.idle: Slots | None = None


_kept: Final[weakref.WeakKeyDictionary[Any, _Kept]] = weakref.WeakKeyDictionary()
_training: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
_lock: Final = threading.RLock()


def release_decoder(model: Any) -> None:
    """Free what decoding keeps of a model: copies of weights, caches, graphs."""
    with _lock:
        _kept.pop(model, None)


def begin_training(model: Any) -> None:
    """From now on nothing is kept between answers, nor weights copied."""
    with _lock:
        _training.add(model)
        release_decoder(model)


def end_training(model: Any) -> None:
    """Training no longer needs the memory."""
    with _lock:
        _training.discard(model)


@contextlib.contextmanager
def open_session(
    model: Any, config: Any, *, seed: int | None, most_tokens: int, at_once: int
) -> Iterator[DecodingSession | str]:
    """A decoder at work.

    Args:
        model: A transformers or peft model in inference mode.
        config: A complete ``GenerationConfig``.
        seed: See :class:`DecodingSession`.
        most_tokens: Tokens of the longest prompt with its answer.
        at_once: Answers that are wanted at the same time; memory may allow fewer.

    Yields:
        The session, or why the decoder does not cover the model or the settings.
    """
    obstacle = find_settings_obstacle(config) or find_decoding_obstacle(model)
    if obstacle is not None:
        yield obstacle
        return
    with _lock:
        kept = _find(model)
        if isinstance(kept, str):
            yield kept
            return
        slots = _take_slots(kept, most_tokens, at_once, copies=model not in _training)
    try:
        yield DecodingSession(slots, config, seed)
    finally:
        with _lock:
            if _kept.get(model) is kept:
                kept.idle = slots
                if model in _training:
                    release_decoder(model)


def _find(model: Any) -> _Kept | str:
    """The model's decoder with the adapters' present values, or why there is none."""
    signature = sign_model(model)
    kept = _kept.get(model)
    if kept is not None and kept.signature == signature:
        kept.decoder.refresh()
        return kept
    readers = read_model(model)
    if isinstance(readers, str):
        return readers
    kept = _kept[model] = _Kept(Decoder(model, readers), signature)
    return kept


def _take_slots(kept: _Kept, most_tokens: int, at_once: int, *, copies: bool) -> Slots:
    decoder = kept.decoder
    if copies:
        decoder.choose_weights(measure_free_bytes(decoder.device), at_once)
    capacity = -(-most_tokens // _CAPACITY_STEP) * _CAPACITY_STEP
    each = measure_slot_bytes(
        len(decoder.layers), decoder.shape.kv_heads, decoder.shape.head_dim, capacity,
        decoder.dtype,
    )  # fmt: skip
    slots, kept.idle = kept.idle, None
    if (
        slots is not None
        and slots.capacity >= capacity
        and slots.capacity <= 4 * capacity
        and slots.count == at_once
        and slots.was_cached == decoder.is_cached
    ):
        return slots
    del slots  # its memory is free from here on
    fitting = int(_CACHE_SHARE * measure_free_bytes(decoder.device)) // each
    count = max(1, min(at_once, fitting))
    if at_once > 1:
        logger.info(
            "%d answers at a time, %d tokens each: %.2f GiB of keys and values.",
            count, capacity, count * each / 2**30,
        )  # fmt: skip
    return Slots(decoder, count, capacity)
