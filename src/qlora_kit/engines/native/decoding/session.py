"""Writing answers: slots, CUDA graphs, and a host that is one token behind the device.

The host needs a token only to see whether an answer has ended and to hand it on. On CUDA it
launches the next step first and reads the last one's tokens meanwhile; an answer that ended has
then been continued by one token, which nobody reads.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.engines.native.decoding.decoder import Decoder
from qlora_kit.engines.native.decoding.sampling import RowSampler, choose_tokens, is_plainly_greedy

__all__ = ["DecodingSession", "Slots"]

logger = logging.getLogger(__name__)

#: Most prompt tokens that go through the model at once, a longer prompt alone.
_PROMPT_TOKENS = 4096

#: Two threads must not capture at once: the allocator and the random state are shared.
_capturing = threading.RLock()


class Slots:
    """The state of the answers being written, on the device: what CUDA graphs read and write.

    Args:
        decoder: The model.
        count: Slots ``S``.
        capacity: Tokens per slot.
    """

    def __init__(self, decoder: Decoder, count: int, capacity: int) -> None:
        self.decoder, self.count, self.capacity = decoder, count, capacity
        self.cache = decoder.make_cache(count, capacity)
        self.rotations = decoder.make_rotations(capacity)
        device = decoder.device
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.positions = torch.zeros(count, dtype=torch.int64, device=device)
        self.was_cached = decoder.is_cached
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warm: set[tuple[int, bool]] = set()
        self._can_capture = device.type == "cuda"

    def step(self, count: int, longest: int, *, greedy: bool) -> Tensor:
        """One token of each of the first ``count`` slots.

        Returns:
            The logits, shape ``(count, V)``. If ``greedy``, the next tokens are in place already.
        """
        key = (count, greedy)
        captured = self._graphs.get(key)
        if captured is None and self._can_capture and key in self._warm:
            captured = self._capture(key)
        if captured is not None:
            captured[0].replay()
            return captured[1]
        self._warm.add(key)
        return self._compute(count, self.capacity if self._can_capture else longest, greedy)

    def _compute(self, count: int, longest: int, greedy: bool) -> Tensor:
        tokens, positions = self.tokens[:count], self.positions[:count]
        logits = self.decoder.step(self.cache, tokens, positions, self.rotations, longest)
        # A slot that nobody reads stays inside its room.
        positions.add_(1).clamp_(max=self.capacity - 1)
        if greedy:
            tokens.copy_(logits.argmax(dim=-1))
        return logits

    def _capture(self, key: tuple[int, bool]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with _capturing, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._compute(key[0], self.capacity, key[1])
        except RuntimeError as error:
            logger.warning("Capturing a CUDA graph failed: %s", str(error).splitlines()[0])
            torch.cuda.synchronize(self.decoder.device)
            self._can_capture = False
            return None
        self._graphs[key] = (graph, logits)
        return self._graphs[key]


@dataclasses.dataclass(eq=False)
class _Answer:
    index: int
    prompt: Sequence[int]
    sampler: RowSampler
    slot: int = -1
    launched: int = 0  # tokens asked of the device
    read: int = 0
    is_done: bool = False
    history: Tensor | None = None


class DecodingSession:
    """Answers to prompts, several at a time.

    Args:
        slots: Where they are written.
        config: What was asked for.
        seed: Makes sampling repeatable, each answer for itself.
    """

    def __init__(self, slots: Slots, config: Any, seed: int | None) -> None:
        self._slots, self._config, self._seed = slots, config, seed
        self._decoder = slots.decoder
        self._ends = frozenset(config.eos_token_id)
        self._active: dict[int, _Answer] = {}
        self._launched: collections.deque[tuple[Any, list[tuple[int, _Answer]]]]
        self._launched = collections.deque()
        self._lag = 1 if self._decoder.device.type == "cuda" else 0

    def answer(self, prompts: Iterator[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Tokens as they come, with the number of the prompt they answer.

        An answer ends with an end token, after ``max_new_tokens``, or after :meth:`finish`.
        """
        waiting = enumerate(prompts)
        held: list[tuple[int, Sequence[int]]] = []
        while True:
            # Not around the yields: what the reader of the tokens does is no business of ours.
            with torch.no_grad():
                self._admit(waiting, held)
                if any(self._is_open(answer) for answer in self._active.values()):
                    self._step()
            if not self._launched:
                return
            while len(self._launched) > self._lag or (self._launched and not self._active):
                yield from self._read()
            if self._launched and not any(map(self._is_open, self._active.values())):
                yield from self._read()

    def finish(self, index: int) -> None:
        """Write no more of an answer."""
        for answer in list(self._active.values()):
            if answer.index == index:
                self._close(answer)

    def _is_open(self, answer: _Answer) -> bool:
        most: int = self._config.max_new_tokens
        return answer.launched < most

    def _close(self, answer: _Answer) -> None:
        answer.is_done = True
        self._active.pop(answer.slot, None)

    def _admit(self, waiting: Any, held: list[tuple[int, Sequence[int]]]) -> None:
        """Read as many prompts as there are free slots."""
        free = [slot for slot in range(self._slots.count) if slot not in self._active]
        while free:
            group: list[_Answer] = []
            size = 0
            while free:
                taken = held.pop() if held else next(waiting, None)
                if taken is None:
                    break
                index, prompt = taken
                if group and size + len(prompt) > _PROMPT_TOKENS:
                    held.append(taken)
                    break
                group.append(self._make_answer(index, prompt, free.pop(0)))
                size += len(prompt)
            if not group:
                return
            self._active.update((answer.slot, answer) for answer in group)
            self._begin(group, [answer.prompt for answer in group])

    def _begin(self, group: list[_Answer], texts: Sequence[Sequence[int]]) -> None:
        """Fill answers' slots with their tokens so far, and choose the next of each."""
        slots = [answer.slot for answer in group]
        logits = self._decoder.read_prompts(self._slots.cache, slots, texts)
        at = torch.tensor(slots, device=self._decoder.device)
        self._slots.positions[at] = torch.tensor(
            [len(text) for text in texts], device=self._decoder.device
        )
        self._slots.tokens[at] = self._choose(logits, group)
        self._launch(group)

    def _make_answer(self, index: int, prompt: Sequence[int], slot: int) -> _Answer:
        device = self._decoder.device
        seed = None if self._seed is None else self._seed + index
        sampler = RowSampler(self._decoder.base, self._config, prompt, device, seed)
        answer = _Answer(index, prompt, sampler, slot)
        room = len(prompt) + self._config.max_new_tokens
        beyond = self._decoder.rereads_beyond
        if sampler.reads_tokens or (beyond is not None and len(prompt) <= beyond < room):
            answer.history = torch.zeros((1, room), dtype=torch.int64, device=device)
            answer.history[0, : len(prompt)] = torch.tensor(prompt, device=device)
        return answer

    def _step(self) -> None:
        active = [answer for answer in self._active.values() if self._is_open(answer)]
        again = [answer for answer in active if self._is_reread(answer)]
        active = [answer for answer in active if answer not in again]
        if active:
            self._continue(active)
        if again:
            # After the step, which has moved all slots on.
            texts = [self._history(answer)[0].tolist() for answer in again]
            self._begin(again, texts)

    def _is_reread(self, answer: _Answer) -> bool:
        length = len(answer.prompt) + answer.launched
        beyond = self._decoder.rereads_beyond
        return beyond is not None and length == beyond + 1 and answer.launched > 0

    def _history(self, answer: _Answer) -> Tensor:
        """The tokens so far, shape ``(1, L)``."""
        assert answer.history is not None
        return answer.history[:, : len(answer.prompt) + answer.launched]

    def _continue(self, active: list[_Answer]) -> None:
        count = min(self._slots.count, 1 << max(answer.slot for answer in active).bit_length())
        longest = max(len(answer.prompt) + answer.launched for answer in active)
        greedy = all(
            is_plainly_greedy(answer.sampler) and answer.history is None for answer in active
        )
        logits = self._slots.step(count, longest, greedy=greedy)
        if not greedy:
            rows: list[_Answer | None] = [None] * count
            for answer in active:
                rows[answer.slot] = answer
            self._slots.tokens[:count] = self._choose(logits, rows)
        self._launch(active)

    def _choose(self, logits: Tensor, rows: Sequence[_Answer | None]) -> Tensor:
        histories = [
            None if row is None or row.history is None else self._history(row) for row in rows
        ]  # fmt: skip
        samplers = [None if row is None else row.sampler for row in rows]
        tokens = choose_tokens(logits, samplers, histories)
        for at, row in enumerate(rows):
            if row is not None and row.history is not None:
                row.history[0, len(row.prompt) + row.launched] = tokens[at]
        return tokens

    def _launch(self, answers: list[_Answer]) -> None:
        """Ask for the tokens that the device will have chosen."""
        for answer in answers:
            answer.launched += 1
        tokens = self._slots.tokens
        if tokens.device.type == "cuda":
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            handle: Any = (host, event)
        else:
            handle = (tokens.clone(), None)
        self._launched.append((handle, [(answer.slot, answer) for answer in answers]))

    def _read(self) -> Iterator[tuple[int, int]]:
        (host, event), answers = self._launched.popleft()
        if event is not None:
            event.synchronize()
        tokens = host.tolist()
        for slot, answer in answers:
            if answer.is_done:
                continue
            answer.read += 1
            token = tokens[slot]
            if token in self._ends or answer.read == self._config.max_new_tokens:
                self._close(answer)
            yield answer.index, token
