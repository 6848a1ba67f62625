"""Keys and values of the answers being written, in memory of fixed size.

Every answer has a slot of its own. Nothing moves when an answer grows or ends, so a CUDA graph
can go on reading and writing the same addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KeyValueCache", "measure_slot_bytes"]


def measure_slot_bytes(
    layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype
) -> int:
    """Bytes that one slot takes."""
    return int(2 * layers * kv_heads * head_dim * capacity * dtype.itemsize)


class KeyValueCache:
    """The cache of ``slots`` answers of at most ``capacity`` tokens, prompts included.

    Attributes:
        slots: Number of answers ``S``.
        capacity: Tokens ``C`` per slot.
        keys: One tensor per layer, shape ``(S, G, C, D)``: a head's keys lie one after the other,
            as attention over one new token reads them.
        values: The same for values.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.capacity = slots, capacity
        shape = (layers, slots, kv_heads, capacity, head_dim)
        # Zeros: what attention masks out is multiplied by zero, which leaves a NaN a NaN.
        self.keys: tuple[Tensor, ...] = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.values: tuple[Tensor, ...] = torch.zeros(shape, dtype=dtype, device=device).unbind()

    def write_prompt(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put a prompt's keys and values, shape ``(T, G, D)``, at the beginning of a slot."""
        tokens = keys.shape[0]
        self.keys[layer][slot, :, :tokens] = keys.transpose(0, 1)
        self.values[layer][slot, :, :tokens] = values.transpose(0, 1)

    def write_tokens(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one token's keys and values in each of the first slots.

        Args:
            layer: The layer.
            positions: Where they go, int64, shape ``(B,)``.
            keys: Shape ``(B, G, D)``.
            values: The same.
        """
        count = positions.shape[0]
        if count == 1:  # one index kernel less to launch
            self.keys[layer][0].index_copy_(1, positions, keys.transpose(0, 1))
            self.values[layer][0].index_copy_(1, positions, values.transpose(0, 1))
            return
        slots = torch.arange(count, device=positions.device)
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values
