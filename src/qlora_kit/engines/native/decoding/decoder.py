"""Answers one token at a time: the layers of ``layers/layer.py`` with a cache of keys and values.

Prompts run through the training step's operations, all of a call laid end to end. A step computes
one token of every answer: on CUDA with Triton through the kernels of :mod:`batch_step`, on a
CPU of one answer through that of :mod:`cpu_step`, elsewhere through torch's own operations in
the order of ``layers/layer.py``. On CUDA it is captured as a CUDA graph by :mod:`session`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.engines.native.decoding.cpu_step import RowStep, make_row_step
from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.support import find_decoding_obstacle
from qlora_kit.engines.native.decoding.weights import DecodingWeights, measure_cached_bytes
from qlora_kit.engines.native.layers.attention import attend, choose_attention, make_block_mask
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle
from qlora_kit.engines.native.layers.layer import rms_norm, rotate
from qlora_kit.engines.native.layers.peft_layers import (
    AdapterPart,
    GroupReader,
    read_adapter,
    read_group,
    read_norms,
)

__all__ = ["Decoder", "DecoderLayer", "read_model", "sign_model"]

logger = logging.getLogger(__name__)

_MEMBERS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "out": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}

#: Share of the free memory that a second, dequantized copy of the weights may take.
_CACHED_SHARE = 0.25


class DecoderLayer(NamedTuple):
    """What a layer reads besides its input; norms have shape ``(H,)`` or ``(D,)``."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: DecodingWeights
    out: DecodingWeights
    gate_up: DecodingWeights
    down: DecodingWeights

    def groups(self) -> tuple[DecodingWeights, ...]:
        return self.qkv, self.out, self.gate_up, self.down


def read_model(model: Any) -> list[dict[str, GroupReader]] | str:
    """The groups of every layer, or why the decoder does not cover the model."""
    obstacle = find_decoding_obstacle(model)
    if obstacle is not None:
        return obstacle
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = base.get_input_embeddings().weight.dtype
    layers = []
    for layer in base.model.layers:
        groups: dict[str, GroupReader] = {}
        for name, modules in _find_groups(layer):
            group = read_group(modules, dtype, trains=False)
            if isinstance(group, str):
                return group
            groups[name] = group
        layers.append(groups)
    return layers


def _find_groups(layer: Any) -> Iterator[tuple[str, list[Any]]]:
    for name, (owner, members) in _MEMBERS.items():
        yield name, [getattr(getattr(layer, owner), member) for member in members]


def sign_model(model: Any) -> object:
    """What must be the same for a decoder to be used again; adapters' values are read anew."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    signs: list[object] = [id(base.get_output_embeddings().weight)]
    for layer in base.model.layers:
        for _, modules in _find_groups(layer):
            for module in modules:
                part: object = read_adapter(module, trains=False)
                if isinstance(part, AdapterPart):
                    part = (part.up.data_ptr(), part.down.data_ptr(), part.scaling)
                linear = getattr(module, "base_layer", module)
                weight, bias = linear.weight, linear.bias
                signs.append((
                    weight.data_ptr(), weight._version, id(getattr(weight, "quant_state", None)),
                    None if bias is None else (bias.data_ptr(), bias._version), part,
                ))  # fmt: skip
    return tuple(signs)


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
        body, config = base.model, base.config
        self._embedding: Tensor = base.get_input_embeddings().weight.detach()
        self._head: Tensor = base.get_output_embeddings().weight.detach()
        self._final_norm: Tensor = body.norm.weight.detach()
        self._rotary = body.rotary_emb
        self.dtype, self.device = self._embedding.dtype, self._embedding.device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim: int = body.layers[0].self_attn.head_dim
        self.epsilon: float = config.rms_norm_eps
        self._attention = choose_attention(self.device, self.dtype, self.head_dim)
        self.layers = [
            DecoderLayer(*read_norms(layer), **{
                name: DecodingWeights(group, self.dtype) for name, group in groups.items()
            })
            for layer, groups in zip(body.layers, readers, strict=True)
        ]  # fmt: skip
        self.kernels: Any = self._choose_kernels()

    @property
    def is_cached(self) -> bool:
        """Whether dequantized weights are kept."""
        return self.layers[0].qkv.whole is not None

    def refresh(self) -> None:
        """Take the adapters' present values."""
        for layer in self.layers:
            for group in layer.groups():
                group.refresh()

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
        return KeyValueCache(
            len(self.layers), slots, self.kv_heads, capacity, self.head_dim, self.dtype, self.device
        )

    def make_rotation(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of every position, shape ``(C, D)``."""
        positions = torch.arange(capacity, device=self.device)[None]
        cos, sin = self._rotary(self._embedding, positions)
        return cos[0].contiguous(), sin[0].contiguous()

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
        spans = list(zip(slots, ends[:-1].tolist(), ends[1:].tolist(), strict=True))
        hidden = self._embedding[ids.to(self.device)]
        cos, sin = self._rotary(hidden, positions.to(self.device)[None])
        mask = make_block_mask(bounds, len(ids)) if self._attention == "mask" else None
        rotation = (cos[0].contiguous(), sin[0].contiguous())
        owners = torch.tensor(slots).repeat_interleave(torch.tensor(lengths)).to(self.device)
        positions = positions.to(self.device)
        for index, layer in enumerate(self.layers):
            if self.kernels is not None:
                qkv = layer.qkv.apply(self._norm(hidden, layer.input_norm))
                q, k, v = self.kernels.rotate_prompts(
                    self, layer, cache, index, qkv, positions, owners, rotation
                )
            else:
                q, k, v = self._project_qkv(hidden, *rotation, layer)
                for slot, start, end in spans:
                    cache.write_prompt(index, slot, k[start:end], v[start:end])
            attended = attend(q, k, v, bounds, longest, mask)
            hidden = self._finish_layer(hidden, attended, layer)
        last = hidden[(ends[1:] - 1).to(self.device)]
        return self._read_logits(last)

    def step(
        self, cache: KeyValueCache, tokens: Tensor, positions: Tensor, rotation: Any, longest: int
    ) -> Tensor:
        """One more token of each of the first ``B`` slots.

        Args:
            cache: The slots.
            tokens: The tokens so far last, int64, shape ``(B,)``.
            positions: Their positions, int64, shape ``(B,)``.
            rotation: From :meth:`make_rotation`.
            longest: No position is at or beyond this.

        Returns:
            Logits, shape ``(B, V)``.
        """
        if len(tokens) == 1 and self.device.type == "cpu" and self._row_step is not None:
            return self._row_step.run(cache, tokens, positions, rotation)
        hidden = self._embedding[tokens]
        if self.kernels is not None and len(tokens) == 1 and self.kernels.row.covers(self):
            row = self.kernels.row
            hidden = row.run_row(self, cache, hidden, positions, rotation)
            logits: Tensor = row.read_row_logits(hidden, self._final_norm, self._head, self.epsilon)
            return logits
        if self.kernels is not None:
            hidden = self.kernels.run_layers(self, cache, hidden, positions, rotation)
            return self._read_logits(hidden)
        cos, sin = rotation[0][positions], rotation[1][positions]
        mask = None
        if len(tokens) > 1 or longest == cache.capacity:
            reach = torch.arange(longest, device=self.device)
            mask = (reach <= positions[:, None])[:, None, None]  # (B, 1, 1, L)
        for index, layer in enumerate(self.layers):
            q, k, v = self._project_qkv(hidden, cos, sin, layer)
            cache.write_tokens(index, positions, k, v)
            # The query heads of one key head are queries of one sequence: (B, G, heads / G, D).
            attended = torch.nn.functional.scaled_dot_product_attention(
                q.unflatten(1, (self.kv_heads, -1)),
                cache.keys[index][: len(tokens), :, :longest],
                cache.values[index][: len(tokens), :, :longest],
                attn_mask=mask,
            )
            hidden = self._finish_layer(hidden, attended, layer)
        return self._read_logits(hidden)

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
        return make_row_step(self, self._embedding, self._final_norm, self._head)

    def _project_qkv(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, layer: DecoderLayer
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._norm(hidden, layer.input_norm)
        qkv = layer.qkv.apply(x).unflatten(1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, self.epsilon)
            k = rms_norm(k, layer.k_norm, self.epsilon)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _finish_layer(self, hidden: Tensor, attended: Tensor, layer: DecoderLayer) -> Tensor:
        hidden = hidden + layer.out.apply(attended.reshape(len(hidden), -1))
        both = layer.gate_up.apply(self._norm(hidden, layer.post_norm))
        if self.kernels is not None:
            return hidden + layer.down.apply(self.kernels.gate(both))
        gate, up = both.chunk(2, dim=1)
        return hidden + layer.down.apply(torch.nn.functional.silu(gate) * up)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kernels is not None:
            normed: Tensor = self.kernels.norm(x, weight, self.epsilon)
            return normed
        return rms_norm(x, weight, self.epsilon)

    def _read_logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(self._norm(hidden, self._final_norm), self._head)

    def _choose_kernels(self) -> Any:
        if self.device.type != "cuda" or self.dtype == torch.float64:
            return None
        obstacle = find_compile_obstacle(self.device)
        if obstacle is not None:
            logger.info("Decoding without kernels of its own: %s.", obstacle)
            return None
        from qlora_kit.engines.native.decoding import batch_step

        return batch_step
