"""Streaming an answer: text as it is produced, and an end that is named.

transformers generates in a worker thread; this stage turns token ids into text, watches for
stop strings and ends the worker when the consumer stops reading. It does not know templates.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean
from qlora_kit.results import FinishReason, LoadedModel, TextChunk

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["generate_stream"]

logger = logging.getLogger(__name__)

# Values that mean "no filtering"; anything else warns when decoding greedily.
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}


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
    stop: str | Sequence[str] = (),
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
        stop: Strings that end the answer; they are not part of it.
        seed: Makes sampling repeatable, and leaves torch's generators as they were.
        **generation_config: Any further field of transformers' ``GenerationConfig``.

    Yields:
        :class:`~qlora_kit.results.TextChunk` objects. The last one has a ``finish_reason``.
        Closing the iterator early, or just leaving the loop, ends generation within one token.

    Raises:
        ConfigError: When an argument cannot work; before anything is computed.
    """
    if not isinstance(model, LoadedModel):
        raise ConfigError(
            f"generate_stream takes what load_quantized or attach_lora returned, "
            f"got {type(model).__name__}."
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}.")
    filters = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given = {name: value for name, value in filters.items() if value is not None}
    for name in ("top_p", "min_p"):
        if name in given and not 0 <= given[name] <= 1:
            raise ConfigError(f"{name} is a probability from 0 to 1, got {given[name]!r}.")
    if temperature is not None and temperature <= 0:
        raise ConfigError(
            f"temperature must be above 0, got {temperature!r}; do_sample=False is greedy."
        )
    config = _make_config(
        model,
        {
            **generation_config,
            **given,
            **({} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}),
            "do_sample": bool(given) if do_sample is None else do_sample,
            "max_new_tokens": max_new_tokens,
        },
    )
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stops):
        raise ConfigError(f"stop must be non-empty strings, got {stop!r}.")
    ids = _encode(model.tokenizer, prompt)
    if len(ids) + max_new_tokens > model.max_seq_length:
        logger.info(
            "%d prompt tokens and up to %d new ones go beyond max_seq_length=%d.",
            len(ids), max_new_tokens, model.max_seq_length,
        )  # fmt: skip
    # The checks above run at the call, not when the first chunk is read.
    return _stream(model, ids, config, stops, seed)


def _stream(
    model: LoadedModel,
    ids: list[int],
    config: GenerationConfig,
    stops: tuple[str, ...],
    seed: int | None,
) -> Iterator[TextChunk]:
    with model.engine.inference(model) as module:
        worker = _Worker(module, ids, config, seed)
        text = _TextAssembler(model.tokenizer, stops)
        ends = set(config.eos_token_id)
        started = time.perf_counter()
        worker.start()
        try:
            count = 0
            reason: FinishReason = "length"
            for token in worker.tokens():
                count += 1
                if token in ends:
                    reason = "eos"
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
        finally:
            worker.stop()


def _chunk(text: str, count: int, started: float, reason: FinishReason | None) -> TextChunk:
    seconds = time.perf_counter() - started
    return TextChunk(text, count, count / seconds if seconds > 0 else 0.0, reason)


def _make_config(model: LoadedModel, fields: Mapping[str, Any]) -> GenerationConfig:
    import copy

    from transformers import GenerationConfig

    config: GenerationConfig = copy.deepcopy(model.model.generation_config)
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    unknown = [name for name in fields if name not in known]
    if unknown:
        hints = "".join(did_you_mean(name, known) for name in unknown)
        raise UnknownOptionError(
            f"generate_stream and GenerationConfig have no {', '.join(map(repr, unknown))}.{hints}"
        )
    if not fields["do_sample"]:
        for name, value in _NEUTRAL.items():
            setattr(config, name, value)
    config.max_length = None
    for name, value in fields.items():
        setattr(config, name, value)
    config.eos_token_id = _stop_token_ids(model, fields.get("eos_token_id"))
    config.pad_token_id = model.tokenizer.pad_token_id
    try:
        config.validate()
    except ValueError as error:
        raise ConfigError(f"transformers refuses these settings: {error}") from error
    return config


def _stop_token_ids(model: LoadedModel, given: Any) -> list[int]:
    """What ends an answer: what the model was loaded with, and what it was trained to end with."""
    if given is not None:
        return [given] if isinstance(given, int) else list(given)
    ids = list(model.base.stop_token_ids)
    formatter = model.record.formatter
    trained = None if formatter is None else formatter.template_spec().get("eos_token")
    if trained is not None:
        ids.insert(0, model.tokenizer.convert_tokens_to_ids(trained))
    return list(dict.fromkeys(ids))


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    exact = getattr(prompt, "token_ids", None)
    if exact is not None:
        ids = [int(token) for token in exact]
    elif isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif not isinstance(prompt, Sequence) or not prompt:
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
        ids = list(
            tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    else:
        ids = [part for part in prompt if isinstance(part, int)]
        if len(ids) != len(prompt):
            raise ConfigError(f"Token ids must be whole numbers, got {prompt!r}.")
    if not ids:
        raise ConfigError("The prompt is empty: it has no tokens.")
    return ids


class _Worker:
    """``model.generate`` in a thread that ends when asked to."""

    _END = object()

    def __init__(
        self, module: Any, ids: list[int], config: GenerationConfig, seed: int | None
    ) -> None:
        self._module, self._ids, self._config, self._seed = module, ids, config, seed
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qlora_kit-generate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tokens(self) -> Iterator[int]:
        """New token ids as they come.

        Raises:
            Exception: Whatever ``generate`` raised in the thread.
        """
        while True:
            item = self._queue.get()
            if item is self._END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End generation after the token in hand and wait for the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        import torch

        try:
            with contextlib.ExitStack() as stack:
                if self._seed is not None:
                    stack.enter_context(torch.random.fork_rng())
                    torch.manual_seed(self._seed)
                self._generate()
        # Not swallowed: raised again where the chunks are read.
        except BaseException as error:  # noqa: BLE001
            self._queue.put(error)
        finally:
            self._queue.put(self._END)

    def _generate(self) -> None:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList
        from transformers.generation import BaseStreamer

        tokens, stopped, prompt_length = self._queue, self._stopped, len(self._ids)

        class Streamer(BaseStreamer):
            def __init__(self) -> None:
                self.left = prompt_length

            def put(self, value: Any) -> None:
                for token in value.flatten().tolist():
                    # generate() streams the prompt first.
                    if self.left > 0:
                        self.left -= 1
                    else:
                        tokens.put(token)

            def end(self) -> None:
                pass

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        device = self._module.get_input_embeddings().weight.device
        input_ids = torch.tensor([self._ids], device=device)  # (1, T)
        self._module.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=self._config,
            streamer=Streamer(),
            stopping_criteria=StoppingCriteriaList([Stopped()]),
        )


class _TextAssembler:
    """Token ids to text, holding back half characters and what may become a stop string."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._begin = 0  # first id that is decoded again, for the spaces between words
        self._read = 0  # first id whose text was not taken yet
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """New text that is certain, and whether a stop string ended it."""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        # A trailing replacement character is the first bytes of a longer one.
        if whole.endswith("\ufffd") or len(whole) <= len(before):
            return "", False
        self._begin, self._read = self._read, len(self._ids)
        return self._release(whole[len(before) :])

    def finish(self) -> tuple[str, bool]:
        """What was held back, at the end."""
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        text, was_stopped = self._release(whole[len(before) :])
        held, self._held = self._held, ""
        return (text, True) if was_stopped else (text + held, False)

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    held = max(held, length)
                    break
        self._held = text[len(text) - held :] if held else ""
        return text[: len(text) - held], False

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
