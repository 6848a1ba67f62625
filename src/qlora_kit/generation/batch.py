"""Whole answers to many prompts: from the engine's decoder, or one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_kit.engines.contract import open_decoder, ready_to_generate
from qlora_kit.generation.detokenization import TextAssembler
from qlora_kit.generation.settings import Stops
from qlora_kit.generation.tokens import open_tokens
from qlora_kit.generation.worker import translate_error
from qlora_kit.handles import LoadedModel
from qlora_kit.progress import open_progress
from qlora_kit.results import Answer, FinishReason

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["answer_all", "put_in_order", "show_progress"]

logger = logging.getLogger(__name__)


class _Draft:
    """An answer being put together."""

    def __init__(self, model: LoadedModel, index: int, stops: Stops) -> None:
        self._text = TextAssembler(model.tokenizer, stops.strings)
        self._stop_ids = stops.token_ids
        self._index, self._pieces, self._count = index, [""], 0

    def add(self, token: int, ends: frozenset[int], most: int) -> Answer | None:
        """The whole answer, if this token was its last."""
        self._count += 1
        if token not in ends:
            piece, was_stopped = self._text.add(token)
            self._pieces.append(piece)
            if was_stopped:
                return self._finish("stop")
            if self._count < most:
                return None
        rest, was_stopped = self._text.finish()
        self._pieces.append(rest)
        if was_stopped or token in self._stop_ids:
            return self._finish("stop")
        return self._finish("eos" if token in ends else "length")

    def _finish(self, reason: FinishReason) -> Answer:
        return Answer(self._index, "".join(self._pieces), self._count, reason)


def answer_all(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    stops: Stops,
    seed: int | None,
    at_once: int,
) -> Iterator[Answer]:
    """Answers as they end.

    Args:
        model: The handle.
        prompts: Token ids.
        config: Complete.
        stops: What ends an answer besides the model's end tokens.
        seed: Makes sampling repeatable.
        at_once: Most answers at the same time.
    """
    if not prompts:
        return
    ends, most = frozenset(config.eos_token_id), int(config.max_new_tokens)
    drafts = [_Draft(model, index, stops) for index in range(len(prompts))]
    with ready_to_generate(model) as module:
        with open_decoder(
            model,
            config,
            seed=seed,
            most_tokens=max(map(len, prompts)) + most,
            at_once=min(at_once, len(prompts)),
        ) as session:
            if not isinstance(session, str):
                try:
                    for index, token in session.answer(iter(prompts)):
                        answer = drafts[index].add(token, ends, most)
                        if answer is not None:
                            session.finish(index)
                            yield answer
                except Exception as error:
                    translated = translate_error(error)
                    if translated is error:
                        raise
                    raise translated from error
                return
        for index, ids in enumerate(prompts):
            own_seed = None if seed is None else seed + index
            with open_tokens(model, module, ids, config, own_seed) as tokens:
                answers = (drafts[index].add(token, ends, most) for token in tokens)
                found = next((answer for answer in answers if answer is not None), None)
            if found is not None:
                yield found


def put_in_order(answers: Iterator[Answer]) -> Iterator[Answer]:
    """Answers in the order of their prompts, each as soon as all before it are there."""
    waiting: dict[int, Answer] = {}
    following = 0
    for answer in answers:
        waiting[answer.index] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def show_progress(answers: Iterator[Answer], total: int, wanted: bool) -> Iterator[Answer]:
    """The same answers, counted by a bar if one is wanted."""
    if not wanted:
        return answers
    return _count(answers, total)


def _count(answers: Iterator[Answer], total: int) -> Iterator[Answer]:
    with open_progress(total, "answering", "answers") as progress:
        for answer in answers:
            progress.update()
            yield answer
