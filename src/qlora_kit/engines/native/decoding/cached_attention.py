"""Attention of one new token of every answer over what its slot holds, in torch's operations.

Of fixed shapes on CUDA, where a step is captured: the whole room of a slot is read, and a mask
says what of it there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.layers.layer import Attention, LayerShape, Placement

__all__ = ["CachedAttention"]


class CachedAttention:
    """A step's attention.

    Args:
        cache: Read and written.
        positions: Of the new tokens, one in each of the first slots, int64, shape ``(B,)``.
        longest: No position is at or beyond this. Of a single answer it is the next one, unless it
            is the cache's capacity.
    """

    def __init__(self, cache: KeyValueCache, positions: Tensor, longest: int) -> None:
        self._cache, self._positions, self._longest = cache, positions, longest
        self._is_alone = len(positions) == 1 and longest < cache.capacity
        self._masks: dict[int, Tensor] = {}

    def of_layer(self, index: int, window: int) -> Attention:
        """What :func:`layer.decoder_layer` takes.

        Args:
            index: The layer's number.
            window: How many tokens, itself included, one looks at; 0 for all.
        """
        start = max(0, self._longest - window) if window and self._is_alone else 0

        def attention(q: Tensor, k: Tensor, v: Tensor, _: Placement, shape: LayerShape) -> Tensor:
            cache, count = self._cache, len(self._positions)
            cache.write_tokens(index, self._positions, k, v)
            # The query heads of one key head are queries of one sequence: (B, G, heads / G, D).
            queries = q.unflatten(1, (shape.kv_heads, -1))
            keys = cache.keys[index][:count, :, start : self._longest]
            values = cache.values[index][:count, :, start : self._longest]
            mask = None if self._is_alone else self._mask(window)
            if shape.softcap:
                return _attend_capped(queries, keys, values, mask, shape.scale, shape.softcap)
            return torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=shape.scale
            )

        return attention

    def _mask(self, window: int) -> Tensor:
        """Shape ``(B, 1, 1, L)``, true where a token may look."""
        if window not in self._masks:
            places = torch.arange(self._longest, device=self._positions.device)
            last = self._positions[:, None]
            mask = places <= last
            if window:
                mask &= places > last - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """The same with soft-capped scores, which no kernel of torch's computes."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((q @ k.mT).to(wide) * (scale / softcap)).tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v
