"""A group of projections as the decoder reads it: weights and adapters in one matrix.

``W @ x + up @ (down @ x)`` is ``[W | up] @ [x, down @ x]``: one product, summed in float32 and
rounded once, whatever kernel a library chooses for one row or for many. Where memory does not
allow a second copy of the weights, they are read as they lie: 4-bit ones by a kernel of this
project for single tokens, and dequantized for the moment otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.peft_layers import GroupReader
from qlora_kit.engines.native.layers.projection import dequantize

__all__ = ["DecodingWeights", "measure_cached_bytes"]

_linear = torch.nn.functional.linear

#: From here on a copy of the weights is less than a product in float32.
_MANY_ROWS = 128


def measure_cached_bytes(group: GroupReader, dtype: torch.dtype) -> int:
    """Bytes of a group's matrix with its adapters beside it."""
    rank = sum(part.down.shape[0] for part in group.adapters if part is not None)
    return int(sum(group.rows) * (group.columns + rank) * dtype.itemsize)


class DecodingWeights:
    """One group's weights.

    Args:
        group: What peft's modules hold.
        dtype: The model's compute dtype.

    Attributes:
        group: The same.
        rank: Ranks of the group's adapters together, ``R``.
        down: LoRA A matrices one above the other, shape ``(R, K)``; ``None`` without adapters.
        up: Scaled LoRA B matrices, block by block, shape ``(N, R)``.
        whole: ``[W | up]``, shape ``(N, K + R)``, after :meth:`cache`.
    """

    def __init__(self, group: GroupReader, dtype: torch.dtype) -> None:
        self.group, self.dtype = group, dtype
        self._device = group.weights[0].device
        self.rank = sum(part.down.shape[0] for part in group.adapters if part is not None)
        self.down: Tensor | None = None
        self.up: Tensor | None = None
        self.whole: Tensor | None = None
        if self.rank:
            shape = (sum(group.rows), self.rank)
            self.up = torch.zeros(shape, dtype=dtype, device=self._device)
            self.down = torch.zeros((self.rank, group.columns), dtype=dtype, device=self._device)
        self.refresh()

    def cache(self) -> None:
        """Keep the weights dequantized, with the adapters beside them."""
        if self.whole is not None:
            return
        rows, columns = sum(self.group.rows), self.group.columns + self.rank
        # On a GPU every row begins where wide loads may.
        step = 1 if self._device.type == "cpu" else 16
        room = torch.empty(
            (rows, -(-columns // step) * step), dtype=self.dtype, device=self._device
        )
        self.whole = room[:, :columns]
        self.whole[:, : self.group.columns] = self._dequantize()
        self._place_up()

    def _place_up(self) -> None:
        if self.whole is not None and self.up is not None:
            self.whole[:, self.group.columns :] = self.up

    def refresh(self) -> None:
        """Take the adapters' present values."""
        rank = row = 0
        for part, rows in zip(self.group.adapters, self.group.rows, strict=True):
            if part is not None:
                assert self.down is not None
                assert self.up is not None
                r = part.down.shape[0]
                self.down[rank : rank + r].copy_(part.down.detach())
                self.up[row : row + rows, rank : rank + r].copy_(part.up.detach() * part.scaling)
                rank += r
            row += rows
        self._place_up()

    def __call__(self, x: Tensor) -> Tensor:
        """The group's products.

        Args:
            x: Shape ``(T, K)``.

        Returns:
            Shape ``(T, N)``, rounded once; biases included.
        """
        low = None if self.down is None else _linear(x, self.down)
        if self.whole is not None:
            # One copy of x is little beside reading the weights.
            wide = x if low is None else torch.cat((x, low), dim=1)
            return _linear(wide, self.whole, self.group.bias)
        return self.multiply_stored(x, low)

    def multiply_stored(self, x: Tensor, low: Tensor | None) -> Tensor:
        """The same from the weights as they are stored, of ``low = down @ x``."""
        group = self.group
        if group.scales:
            parts, spans = [self._dequantize()], [slice(None)]
        else:
            parts, spans = list(group.weights), []
            start = 0
            for rows in group.rows:
                spans.append(slice(start, start + rows))
                start += rows
        out = [self._add(x, low, weight, span) for weight, span in zip(parts, spans, strict=True)]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _add(self, x: Tensor, low: Tensor | None, weight: Tensor, span: slice) -> Tensor:
        bias = None if self.group.bias is None else self.group.bias[span]
        if low is None or self.up is None:
            return _linear(x, weight, bias)
        if x.device.type == "cuda" and x.dtype != torch.float32:
            return self._add_once(x, low, weight, span)
        if x.shape[0] == 1:
            # A bias is added before the sum of a single row is rounded; addmm's kernel rounds.
            update = _linear(low, self.up[span])
            out = _linear(x, weight, update[0])
        else:
            out = (low @ self.up[span].T).addmm_(x, weight.T)
        return out if bias is None else out.add_(bias)

    def _add_once(self, x: Tensor, low: Tensor, weight: Tensor, span: slice) -> Tensor:
        """A GPU's kernels that add a product to what is there round the product before."""
        assert self.up is not None
        bias = None if self.group.bias is None else self.group.bias[span]
        if x.shape[0] >= _MANY_ROWS:
            wide = torch.cat((weight, self.up[span]), dim=1)
            return _linear(torch.cat((x, low), dim=1), wide, bias)
        out = torch.mm(x, weight.T, out_dtype=torch.float32)
        out += low @ self.up[span].T
        if bias is not None:
            out += bias
        return out.to(x.dtype)

    def _dequantize(self) -> Tensor:
        group = self.group
        return dequantize(
            group.weights, group.scales, group.rows, group.columns, group.blocksize,
            group.quant_type, self.dtype,
        )  # fmt: skip
