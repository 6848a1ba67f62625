"""Where an answer's tokens come from: the engine's decoder, or transformers' ``generate``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from qlora_kit.engines.contract import open_decoder
from qlora_kit.generation.worker import Worker, translate_error
from qlora_kit.handles import LoadedModel

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["open_tokens"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_tokens(
    model: LoadedModel, module: Any, ids: list[int], config: GenerationConfig, seed: int | None
) -> Iterator[Iterator[int]]:
    """The tokens of one answer as they come; nothing is computed before the first is asked for.

    Args:
        model: The handle.
        module: Its model in inference mode.
        ids: The prompt.
        config: Complete.
        seed: Makes sampling repeatable.
    """
    most = len(ids) + (config.max_new_tokens or 0)
    with open_decoder(model, config, seed=seed, most_tokens=most) as session:
        if not isinstance(session, str):
            tokens = _translated(session.answer(iter([ids])))
            with contextlib.closing(tokens):
                yield tokens
            return
        logger.info("Answering through transformers' generate: %s.", session)
        worker = Worker(module, ids, config, seed)
        worker.start()
        try:
            yield worker.tokens()
        finally:
            worker.stop()


def _translated(tokens: Iterator[tuple[int, int]]) -> Generator[int, None, None]:
    try:
        for _, token in tokens:
            yield token
    except Exception as error:
        translated = translate_error(error)
        if translated is error:
            raise
        raise translated from error
