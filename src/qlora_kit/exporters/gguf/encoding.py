"""Turning one tensor into the bytes of a GGUF type, row by row and on every core.

Rows are converted to float32 and encoded in pieces of a few megabytes, so a tensor is never
held in float32 as a whole. This module knows tensors and types. It does not know files.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import ExportError
from qlora_kit.exporters.gguf.ggml import encode_rows

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["encode_tensor"]

# Large enough that a call's overhead vanishes, small enough to stay near the cache.
_PIECE_NUMBERS: Final = 1 << 20

_LARGEST_F16: Final = 65504.0


def encode_tensor(
    tensor: torch.Tensor, type_name: str, name: str, pool: Executor
) -> Iterator[NDArray[Any]]:
    """Encode a tensor, piece by piece in file order.

    Args:
        tensor: Any floating dtype, on the CPU, any number of dimensions.
        type_name: The type to store it in, as ``gguf.GGMLQuantizationType`` spells it.
        name: Its name, for messages.
        pool: Where pieces are encoded; each call occupies one worker.

    Yields:
        Contiguous arrays whose bytes follow each other in the file.

    Raises:
        ExportError: When a weight is not finite, or too large for 16-bit floats.
    """
    columns = tensor.shape[-1] if tensor.ndim else 1
    rows = tensor.reshape(-1, columns)
    step = max(1, _PIECE_NUMBERS // max(1, columns))
    starts = range(0, rows.shape[0], step)
    yield from pool.map(lambda start: _encode(rows[start : start + step], type_name, name), starts)


def _encode(rows: torch.Tensor, type_name: str, name: str) -> NDArray[Any]:
    import torch

    values = rows.to(torch.float32).contiguous()
    # One pass finds infinities, NaN (which max() propagates) and overflow alike.
    low, high = torch.aminmax(values) if values.numel() else (values.sum(), values.sum())
    peak = max(-float(low), float(high))
    if not peak < float("inf"):
        raise ExportError(
            f"{name} holds numbers that are not finite; training has diverged. Train with a "
            "lower learning rate, or export an earlier checkpoint."
        )
    match type_name:
        case "F32":
            return values.numpy()
        case "F16":
            if peak > _LARGEST_F16:
                raise ExportError(
                    f"{name} holds {peak:g}, which float16 cannot (its limit is 65504). Export "
                    "with quantization='bf16' or 'q8_0'."
                )
            return values.to(torch.float16).numpy()
        case "BF16":
            return values.to(torch.bfloat16).view(torch.int16).numpy()
        case _:
            return encode_rows(values.numpy(), type_name)
