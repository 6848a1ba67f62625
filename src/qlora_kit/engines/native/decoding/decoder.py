"""Answers one token at a time: the layers of ``layers/layer.py`` with a cache of keys and values.

Prompts run through the training step's operations, all of a call laid end to end. A step computes
one token of every answer: on CUDA with Triton through the kernels of :mod:`batch_step` where those
compute the family, on a CPU of one answer through that of :mod:`cpu_step`, elsewhere through
torch's own operations. On CUDA it is captured as a CUDA graph by :mod:`session`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.engines.native.decoding.cached_attention import CachedAttention
from qlora_kit.engines.native.decoding.cpu_step import RowStep, make_row_step
from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.model_layers import DecoderLayer, make_layer
from qlora_kit.engines.native.decoding.support import find_kernel_obstacle
from qlora_kit.engines.native.decoding.vocabulary import DecodingVocabulary
from qlora_kit.engines.native.decoding.weights import measure_cached_bytes
from qlora_kit.engines.native.layers.architectures import find_decoder
from qlora_kit.engines.native.layers.attention_choice import resolve_attention
from qlora_kit.engines.native.layers.family_reader import read_shape
from qlora_kit.engines.native.layers.layer import (
    Attention,
    LayerShape,
    Norm,
    Placement,
    add_fed,
    attend_placed,
    attention_block,
    decoder_layer,
)
from qlora_kit.engines.native.layers.peft_layers import GroupReader
from qlora_kit.engines.native.layers.positions import Positions, Rotation

__all__ = ["Decoder", "Rotations"]

logger = logging.getLogger(__name__)

#: Share of the free memory that a second, dequantized copy of the weights may take.
_CACHED_SHARE = 0.25


class Rotations(NamedTuple):
    """Where the tokens of a slot stand, each as the last one of its answer so far.

    Attributes:
        layers: Cosines and sines of every position, shape ``(C, R)``, for each layer.
        stretch: What queries of every position are multiplied with, shape ``(C, 1, 1)``.
    """

    layers: list[Rotation]
    stretch: Tensor | None


class Decoder:
    """A model's tensors, ready to write answers.

    Args:
        model: A transformers or peft model; it is read, never changed.
        readers: What :func:`read_model` found.
    """

    def __init__(self, model: Any, readers: Sequence[dict[str, GroupReader]]) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        #: transformers' model, whose methods make score processors.
        self.base = base
        found = find_decoder(base)
        assert found is not None
        decoder, family = found
        config = base.config.get_text_config()
        self.vocabulary = DecodingVocabulary(base, decoder, family)
        self.dtype, self.device = self.vocabulary.embedding.dtype, self.vocabulary.embedding.device
        self.shape = read_shape(decoder, config, family)
        self._positions = Positions(decoder, config, family)
        self._attention = resolve_attention("auto", self.device, self.dtype, self.shape)
        self.layers = [
            make_layer(layer, groups, family, self.dtype, int(window))
            for layer, groups, window in zip(
                decoder.layers, readers, self._positions.windows, strict=True
            )
        ]
        self.kernels: Any = self._choose_kernels()

    @property
    def rereads_beyond(self) -> int | None:
        """Tokens beyond which an answer is read anew, as Phi-3's ``generate`` does; or ``None``."""
        return self._positions.rereads_beyond

    @property
    def turned_widths(self) -> set[int]:
        """How many dimensions of a head turn with its position, in any of the layers."""
        return {rotation.cos.shape[1] for rotation in self.make_rotations(1).layers}

    @property
    def is_cached(self) -> bool:
        """Whether dequantized weights are kept."""
        return self.layers[0].groups()[0].whole is not None

    def refresh(self) -> None:
        """Take the adapters' present values."""
        for layer in self.layers:
            for group in layer.groups():
                group.refresh()
            for copies in layer.experts.copies if layer.experts is not None else ():
                copies.refresh()

    def choose_weights(self, free_bytes: int, at_once: int) -> None:
        """Keep dequantized weights where they are of use and memory is plentiful.

        Measured on an H200 (2026-11-28, one row, layers of a 4B model): the products of a layer
        take 49 microseconds from 4 bits and 58 from 16 bits. Several rows are multiplied with
        dequantized weights.

        Args:
            free_bytes: Free memory of the device.
            at_once: Answers that are to be written at the same time.
        """
        if self.is_cached:
            return
        if at_once == 1 and self.kernels is not None and self.kernels.row.reads_stored(self):
            return
        if at_once == 1 and self._reads_stored:
            return
        needed = sum(
            measure_cached_bytes(group.group, self.dtype)
            for layer in self.layers for group in layer.groups()
        )  # fmt: skip
        if needed > _CACHED_SHARE * free_bytes:
            logger.info(
                "Decoding reads the weights as they are stored: a 16-bit copy would take "
                "%.1f GiB, and %.1f GiB are free.", needed / 2**30, free_bytes / 2**30,
            )  # fmt: skip
            return
        for layer in self.layers:
            for group in layer.groups():
                group.cache()
        logger.info(
            "Decoding keeps a copy of the weights in %s: %.2f GiB.", self.dtype, needed / 2**30
        )

    def make_cache(self, slots: int, capacity: int) -> KeyValueCache:
        """An empty cache."""
        shape = self.shape
        return KeyValueCache(
            len(self.layers), slots, shape.kv_heads, capacity, shape.head_dim, self.dtype,
            self.device,
        )  # fmt: skip

    def make_rotations(self, capacity: int) -> Rotations:
        """Of every position that a slot has room for."""
        positions = torch.arange(capacity, device=self.device)
        like = self.vocabulary.embedding[:1]
        # Keys keep the frequencies of the length at which they were computed, as in transformers.
        found = self._positions.compute(like, positions, positions + 1)
        kept = {
            key: Rotation(one.cos.contiguous(), one.sin.contiguous()) for key, one in found.items()
        }
        stretch = self._positions.stretch(positions, self.dtype)
        return Rotations([kept[key] for key in self._positions.keys], stretch)

    def read_prompts(
        self, cache: KeyValueCache, slots: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> Tensor:
        """Fill slots with prompts.

        Args:
            cache: Where keys and values go.
            slots: One per prompt.
            prompts: Their token ids.

        Returns:
            The logits after each prompt, shape ``(prompts, V)``.
        """
        lengths = [len(prompt) for prompt in prompts]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        positions = torch.cat([torch.arange(length) for length in lengths])
        bounds = ends.to(torch.int32).to(self.device)
        longest = torch.tensor(max(lengths), dtype=torch.int32)
        hidden = self.vocabulary.look_up(ids.to(self.device))
        positions = positions.to(self.device)
        places = self._positions.place(
            hidden, positions, bounds, longest, has_mask=self._attention == "mask"
        )
        if self.kernels is not None:
            owners = torch.tensor(slots).repeat_interleave(torch.tensor(lengths)).to(self.device)
            hidden = self.kernels.read_prompts(self, cache, hidden, positions, owners, places)
        else:
            spans = list(zip(slots, ends[:-1].tolist(), ends[1:].tolist(), strict=True))
            for index, (layer, place) in enumerate(zip(self.layers, places, strict=True)):
                attention = functools.partial(_attend_and_keep, cache, index, spans)
                hidden = self._run_layer(hidden, place, layer, attention)
        return self._score(hidden[(ends[1:] - 1).to(self.device)])

    def step(
        self,
        cache: KeyValueCache,
        tokens: Tensor,
        positions: Tensor,
        rotations: Rotations,
        longest: int,
    ) -> Tensor:
        """One more token of each of the first ``B`` slots.

        Args:
            cache: The slots.
            tokens: The tokens so far last, int64, shape ``(B,)``.
            positions: Their positions, int64, shape ``(B,)``.
            rotations: From :meth:`make_rotations`.
            longest: No position is at or beyond this.

        Returns:
            Logits, shape ``(B, V)``.
        """
        if len(tokens) == 1 and self.device.type == "cpu" and self._row_step is not None:
            return self._row_step.run(cache, tokens, positions, rotations)
        hidden = self.vocabulary.look_up(tokens)
        if self.kernels is not None and len(tokens) == 1 and self.kernels.row.covers(self):
            row = self.kernels.row
            hidden = row.run_row(self, cache, hidden, positions, rotations)
            logits: Tensor = row.read_row_logits(self, hidden)
            return self.vocabulary.finish(logits)
        if self.kernels is not None:
            hidden = self.kernels.run_layers(self, cache, hidden, positions, rotations)
            return self._score(hidden)
        stretch = None if rotations.stretch is None else rotations.stretch[positions]
        here: dict[int, tuple[Tensor, Tensor]] = {}
        for cos, sin in rotations.layers:
            if id(cos) not in here:
                here[id(cos)] = cos[positions], sin[positions]
        attention = CachedAttention(cache, positions, longest)
        # What it looks at is in the cache: a step has no examples laid end to end.
        unused = positions
        for index, (layer, rotation) in enumerate(zip(self.layers, rotations.layers, strict=True)):
            place = Placement(*here[id(rotation.cos)], stretch, unused, unused, unused, None)
            look = attention.of_layer(index, layer.window)
            hidden = self._run_layer(hidden, place, layer, look, is_step=True)
        return self._score(hidden)

    @property
    def _reads_stored(self) -> bool:
        """Whether a CPU would gain nothing from a copy: prompts would, of dequantized weights."""
        return (
            self.device.type == "cpu"
            and not any(group.group.scales for layer in self.layers for group in layer.groups())
            and self._row_step is not None
        )

    @functools.cached_property
    def _row_step(self) -> RowStep | None:
        """Made for the first answer that is written alone: it may have to be compiled."""
        return make_row_step(self)

    def _run_layer(
        self,
        hidden: Tensor,
        place: Placement,
        layer: DecoderLayer,
        attention: Attention,
        *,
        is_step: bool = False,
    ) -> Tensor:
        if layer.experts is None:
            return decoder_layer(hidden, place, layer.tensors, self.shape, attention)
        hidden, x = attention_block(hidden, place, layer.tensors, self.shape, attention)
        fed = layer.experts.answer(x) if is_step else layer.experts(x, None)[0]
        return add_fed(hidden, fed, layer.tensors, self.shape)

    def _score(self, hidden: Tensor) -> Tensor:
        if self.kernels is None:
            return self.vocabulary.score(hidden)
        normed = self.kernels.norm(hidden, Norm(self.vocabulary.norm.weight), self.shape)
        return self.vocabulary.finish(torch.nn.functional.linear(normed, self.vocabulary.head))

    def _choose_kernels(self) -> Any:
        if self.device.type != "cuda" or self.dtype == torch.float64:
            return None
        obstacle = find_kernel_obstacle(self)
        if obstacle is not None:
            logger.info(
                "Steps of answers go through torch's own operations: of the kernels, none computes "
                "%s.", obstacle,
            )  # fmt: skip
            return None
        from qlora_kit.engines.native.decoding import batch_step

        return batch_step


def _attend_and_keep(
    cache: KeyValueCache,
    index: int,
    spans: list[tuple[int, int, int]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Placement,
    shape: LayerShape,
) -> Tensor:
    """Attention of prompts, whose keys and values go into their slots."""
    for slot, start, end in spans:
        cache.write_prompt(index, slot, k[start:end], v[start:end])
    return attend_placed(q, k, v, place, shape)
