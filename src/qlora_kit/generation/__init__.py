"""Streaming an answer: text as it is produced, and an end that is named.

The engine's decoder writes token ids, or transformers in a worker thread; this stage turns them
into text, watches for stop strings and ends generation when the consumer stops reading.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qlora_kit.boundaries import describe_cause
from qlora_kit.data.formatters.loop_budget import LoopBudget
from qlora_kit.data.tokens.text_tokenizer import refuse_half_characters
from qlora_kit.engines.contract import ready_to_generate
from qlora_kit.errors import ConfigError, invalid_value
from qlora_kit.generation.batch import answer_all, put_in_order, show_progress
from qlora_kit.generation.detokenization import TextAssembler
from qlora_kit.generation.settings import Stops, check_sampling, make_config, read_stops
from qlora_kit.generation.tokens import open_tokens
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.results import Answer, FinishReason, TextChunk
from qlora_kit.values import is_whole_number

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["generate_batch", "generate_stream"]

logger = logging.getLogger(__name__)

#: Characters a token: ordinary text has about 4, and runs of spaces up to a hundred.
_SURELY_BEYOND: Final = 128


def generate_stream(
    model: LoadedModel,
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 256,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    **generation_config: Any,
) -> Iterator[TextChunk]:
    """Yield the answer to a prompt piece by piece.

    Args:
        model: A loaded or adapted model; left in the mode it was found in.
        prompt: What ``formatter.prompt(...)`` returned, any text, token ids, or a list of chat
            messages (``{"role": ..., "content": ...}``) for the tokenizer's chat template.
        max_new_tokens: Most tokens to generate, the stop token included.
        do_sample: ``False`` for the most likely token each time. By default, sampled when
            ``temperature``, ``top_p``, ``top_k`` or ``min_p`` is given and greedy otherwise.
        temperature: Above 1 flattens the distribution, below 1 sharpens it.
        top_p: Sample from the smallest set of tokens with this much probability.
        top_k: Sample from this many most likely tokens.
        min_p: Sample from tokens at least this likely relative to the best (arXiv:2407.01082).
        repetition_penalty: Above 1 makes tokens that were already used less likely.
        stop: Strings that end the answer, or names of special tokens; they are not part of it.
        seed: Makes sampling repeatable, and leaves torch's generators as they were.
        **generation_config: Any further field of transformers' ``GenerationConfig``.

    Yields:
        :class:`~qlora_kit.results.TextChunk` objects. The last one has a ``finish_reason``.
        Closing the iterator early, or just leaving the loop, ends generation within one token.

    Raises:
        ConfigError: When an argument cannot work; before anything is computed.
    """
    config, stops = _read_settings(
        model,
        "generate_stream",
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        **generation_config,
    )
    ids = _encode(model, prompt)
    _mention_length(model, len(ids), max_new_tokens)
    # The checks above run at the call, not when the first chunk is read.
    return _stream(model, ids, config, stops, seed)


def generate_batch(
    model: LoadedModel,
    prompts: Iterable[str | Sequence[int] | Sequence[Mapping[str, str]]],
    *,
    at_once: int = 64,
    in_order: bool = True,
    progress: bool = False,
    seed: int | None = None,
    **settings: Any,
) -> Iterator[Answer]:
    """Answer many prompts, several at a time.

    A prompt is begun as soon as another one's answer ends. Models and settings that the engine's
    decoder does not cover are answered one after the other.

    Args:
        model: A loaded or adapted model; left in the mode it was found in.
        prompts: What ``generate_stream`` takes as ``prompt``, any number.
        at_once: Most answers written at the same time; memory may allow fewer.
        in_order: ``False`` for answers in the order in which they end.
        progress: Whether to show a bar.
        seed: Makes sampling repeatable, whatever else is written beside an answer.
        **settings: Everything else that ``generate_stream`` takes.

    Yields:
        One :class:`~qlora_kit.results.Answer` for each prompt.

    Raises:
        ConfigError: When an argument cannot work; before anything is computed.
    """
    for name, flag in (("in_order", in_order), ("progress", progress)):
        if not isinstance(flag, bool):
            raise invalid_value(name, "must be True or False", flag, "generate_batch")
    if not is_whole_number(at_once, at_least=1):
        raise ConfigError(f"at_once must be at least 1, got {at_once!r}.")
    # A text is a sequence of texts too, each of one character.
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts must be several prompts, got {prompts!r}.")
    config, stops = _read_settings(model, "generate_batch", seed=seed, **settings)
    ids = [_encode(model, prompt) for prompt in prompts]
    if ids:
        _mention_length(model, max(map(len, ids)), config.max_new_tokens)
    answers = answer_all(model, ids, config, stops, seed, at_once)
    return show_progress(put_in_order(answers) if in_order else answers, len(ids), progress)


def _read_settings(
    model: LoadedModel,
    caller: str,
    *,
    max_new_tokens: int = 256,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    **generation_config: Any,
) -> tuple[GenerationConfig, Stops]:
    """The checked settings of a call, and what ends its answers."""
    if not isinstance(model, LoadedModel):
        raise ConfigError(
            f"{caller} takes what load_quantized or attach_lora returned, "
            f"got {type(model).__name__}."
        )
    filters = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(max_new_tokens, filters, repetition_penalty, seed)
    given = {name: value for name, value in filters.items() if value is not None}
    config = make_config(
        model,
        {
            **generation_config,
            **given,
            **({} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}),
            "do_sample": bool(given) if do_sample is None else do_sample,
            "max_new_tokens": max_new_tokens,
        },
        caller,
    )
    stops = read_stops(stop, model)
    config.eos_token_id = list(dict.fromkeys((*config.eos_token_id, *stops.token_ids)))
    return config, stops


def _mention_length(model: LoadedModel, length: int, max_new_tokens: int) -> None:
    if length > model.max_seq_length:
        logger.warning(
            "A prompt of %s tokens is longer than max_seq_length=%s, for which the model was "
            "loaded. It is read whole; answers may suffer where nothing of that length was "
            "trained.",
            f"{length:,}", f"{model.max_seq_length:,}",
        )  # fmt: skip
    elif length + max_new_tokens > model.max_seq_length:
        logger.info(
            "%d prompt tokens and up to %d new ones go beyond max_seq_length=%d.",
            length, max_new_tokens, model.max_seq_length,
        )  # fmt: skip


def _stream(
    model: LoadedModel,
    ids: list[int],
    config: GenerationConfig,
    stops: Stops,
    seed: int | None,
) -> Iterator[TextChunk]:
    started = time.perf_counter()
    with (
        ready_to_generate(model) as module,
        open_tokens(model, module, ids, config, seed) as tokens,
    ):
        text = TextAssembler(model.tokenizer, stops.strings)
        ends = set(config.eos_token_id)
        count = 0
        reason: FinishReason = "length"
        for token in tokens:
            count += 1
            if token in ends:
                reason = "stop" if token in stops.token_ids else "eos"
                break
            piece, was_stopped = text.add(token)
            if was_stopped:
                reason = "stop"
                yield _chunk(piece, count, started, reason)
                return
            if piece:
                yield _chunk(piece, count, started, None)
        rest, was_stopped = text.finish()
        yield _chunk(rest, count, started, "stop" if was_stopped else reason)


def _chunk(text: str, count: int, started: float, reason: FinishReason | None) -> TextChunk:
    seconds = time.perf_counter() - started
    return TextChunk(text, count, count / seconds if seconds > 0 else 0.0, reason)


def _check_length(model: LoadedModel, prompt: str) -> None:
    """Refuse text that no tokenizer brings within what the model reads, without trying."""
    if len(prompt) > _SURELY_BEYOND * _count_readable(model):
        _refuse_length(model, f"{len(prompt):,} characters")


def _count_readable(model: LoadedModel) -> int:
    """Tokens that a model has positions for, or was loaded for where those are more."""
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or 0
    return max(model.max_seq_length, positions)


def _refuse_length(model: LoadedModel, length: str) -> NoReturn:
    raise ConfigError(
        f"The prompt has {length}, and this model reads at most {_count_readable(model):,} tokens. "
        "Shorten it, or load the model with a larger ",
        Setting("max_seq_length", of="load_quantized"),
        ".",
    )


def _is_message(message: Mapping[str, Any]) -> bool:
    content = message.get("content", ...)
    return isinstance(message.get("role"), str) and (
        isinstance(content, str)
        # Parts, for templates that take them; nothing, beside calls of tools.
        or (isinstance(content, list) and bool(content))
        or (content is None and bool(message.get("tool_calls")))
    )


def _encode(model: LoadedModel, prompt: Any) -> list[int]:
    tokenizer: Any = model.tokenizer
    exact = getattr(prompt, "token_ids", None)
    if exact is not None:
        ids = [int(token) for token in exact]
    elif isinstance(prompt, str):
        _check_length(model, prompt)
        refuse_half_characters(prompt)
        ids = list(tokenizer(prompt)["input_ids"])
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray) or not prompt:
        raise ConfigError(
            f"prompt must be text, formatter.prompt(...), token ids or chat messages; "
            f"got {prompt!r}."
        )
    elif all(isinstance(part, Mapping) for part in prompt):
        if tokenizer.chat_template is None:
            raise ConfigError(
                "This tokenizer has no chat template, so chat messages cannot be turned into a "
                "prompt. Give text, or formatter.prompt(...)."
            )
        if not all(_is_message(message) for message in prompt):
            raise ConfigError(
                f"Chat messages are {{'role': ..., 'content': ...}} dictionaries, got {prompt!r}."
            )
        for message in prompt:
            if isinstance(message.get("content"), str):
                refuse_half_characters(message["content"])
        try:
            ids = list(
                tokenizer.apply_chat_template(
                    list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False,
                    range=LoopBudget.of(tokenizer.chat_template).make_range,
                )
            )  # fmt: skip
        # A template computes whatever it likes.
        except Exception as error:
            raise ConfigError(
                "The tokenizer's chat template refuses these messages: "
                f"{describe_cause(error)} Give text, or formatter.prompt(...)."
            ) from error
    else:
        if all(isinstance(part, str) for part in prompt):
            raise ConfigError(
                f"prompt is a list of {len(prompt)} texts, and one stream answers one. Give them "
                "to generate_batch(model, prompts), or call generate_stream for each.",
                parameter="prompt",
            )
        ids = [part for part in prompt if is_whole_number(part)]
        if len(ids) != len(prompt):
            raise ConfigError(f"Token ids must be whole numbers, got {prompt!r}.")
    if not ids:
        raise ConfigError("The prompt is empty: it has no tokens.")
    if len(ids) > _count_readable(model):
        _refuse_length(model, f"{len(ids):,} tokens")
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    if min(ids) < 0 or max(ids) >= vocabulary:
        bad = next(token for token in ids if not 0 <= token < vocabulary)
        raise ConfigError(f"Token id {bad} does not exist: this model has 0 to {vocabulary - 1}.")
    return ids
