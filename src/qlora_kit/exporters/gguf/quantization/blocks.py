"""Turning one tensor into the bytes of a GGUF type, row by row and on every core.

Rows are converted to float32 and encoded in pieces of a few megabytes, so a tensor is never
held in float32 as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import ExportError
from qlora_kit.exporters.gguf.quantization.ggml import encode_rows, widen_bf16
from qlora_kit.messages import Setting

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["cut_rows", "encode_piece", "encode_values", "widen_piece"]

# Large enough that a call's overhead vanishes, small enough to stay near the cache. Each worker
# holds one in float32.
_PIECE_NUMBERS: Final = 1 << 18

# The largest finite float16; ggml would write infinity beyond it.
_LARGEST_F16: Final = 65504.0

_INFINITY: Final = float("inf")


def cut_rows(tensor: torch.Tensor, matrices: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's rows, all leading dimensions taken as one, in pieces of a few megabytes.

    Args:
        tensor: Shape (..., columns).
        matrices: How many matrices it stacks that no piece may reach across.

    Returns:
        Pieces in order, each with the number of its matrix.
    """
    columns = tensor.shape[-1]
    rows = tensor.reshape(matrices, -1, columns)
    step = max(1, _PIECE_NUMBERS // columns)
    for matrix in range(matrices):
        for start in range(0, rows.shape[1], step):
            yield matrix, rows[matrix, start : start + step]


def widen_piece(rows: torch.Tensor, name: str) -> NDArray[np.float32]:
    """Some rows in float32, looked through.

    Args:
        rows: Shape (rows, columns), any floating dtype, on the CPU.
        name: The tensor's name, for messages.

    Returns:
        Contiguous numbers, good until this thread widens others.

    Raises:
        ExportError: When one is not finite.
    """
    import torch

    rows = rows.contiguous()
    values: NDArray[np.float32]
    if rows.dtype == torch.float32:
        values = rows.numpy()
    else:
        values = _scratch.take(rows.numel()).reshape(rows.shape)
        if rows.dtype != torch.bfloat16 or not widen_bf16(rows, values):
            torch.from_numpy(values).copy_(rows)
    # Both propagate NaN.
    if not -_INFINITY < values.min() <= values.max() < _INFINITY:
        raise ExportError(
            f"{name} holds numbers that are not finite; training has diverged. Train with a "
            "lower learning rate, or export an earlier checkpoint."
        )
    return values


class _Scratch(threading.local):
    """One thread's float32 numbers; taken anew for every piece, memory would be faulted in anew."""

    numbers: NDArray[np.float32] | None = None

    def take(self, count: int) -> NDArray[np.float32]:
        import numpy as np

        if self.numbers is None or self.numbers.size < count:
            self.numbers = np.empty(count, dtype=np.float32)
        return self.numbers[:count]


_scratch: Final = _Scratch()


def encode_values(
    values: NDArray[np.float32],
    type_name: str,
    name: str,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """Encode what :func:`widen_piece` returned.

    Args:
        values: Shape (rows, columns).
        type_name: The type to store them in, as ``gguf.GGMLQuantizationType`` spells it.
        name: The tensor's name, for messages.
        importance: How much each column matters, shape (columns,); what is not quantized ignores
            it.

    Returns:
        A contiguous array with the bytes of the file; of ``F32``, the values themselves.

    Raises:
        ExportError: When a weight is too large for 16-bit floats.
    """
    import torch

    encoded: NDArray[Any]
    match type_name:
        case "F32":
            encoded = values
        case "F16":
            peak = max(-float(values.min()), float(values.max()))
            if peak > _LARGEST_F16:
                raise ExportError(
                    f"{name} holds {peak:g}, which float16 cannot (its limit is 65504).",
                    advice=(
                        "Export with ",
                        Setting("quantization", "bf16", "export_model"),
                        " or 'q8_0'.",
                    ),
                )
            encoded = torch.from_numpy(values).to(torch.float16).numpy()
        case "BF16":
            # torch rounds to nearest even, as ggml_compute_fp32_to_bf16 (ggml-impl.h) does.
            encoded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        case _:
            encoded = encode_rows(values, type_name, importance)
    return encoded


def encode_piece(
    rows: torch.Tensor,
    type_name: str,
    name: str,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """Encode some rows: :func:`widen_piece` and :func:`encode_values` in one, bytes to keep."""
    values = widen_piece(rows, name)
    encoded = encode_values(values, type_name, name, importance)
    return encoded.copy() if encoded is values else encoded
