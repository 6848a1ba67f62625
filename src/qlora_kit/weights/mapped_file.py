"""One safetensors file, memory-mapped, whose pages leave this process's memory after use.

The safetensors library maps files too, but what was read stays mapped, and counts as this
process's memory, until the file is closed: a whole checkpoint in the end.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["TORCH_DTYPES", "MappedFile", "release_pages"]

#: Name in safetensors headers -> name in torch.
TORCH_DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

_LENGTH_BYTES: Final = 8
# From linux/mman.h.
_MADV_DONTNEED: Final = 4


def release_pages(address: int, size: int) -> None:
    """Give back the memory of a mapped file's pages, which are read again when they are used.

    Args:
        address: Where in memory a part begins that nobody writes to.
        size: Its bytes.
    """
    if not sys.platform.startswith("linux"):
        return
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    # Nobody writes to these pages, so dropping them loses nothing (madvise(2)).
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), _MADV_DONTNEED
    )


class MappedFile:
    """A safetensors file whose tensors are views of the file.

    Args:
        path: The file. It must not change while this is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            self._entries: dict[str, Any] = json.loads(file.read(length))
        self._start = _LENGTH_BYTES + length

    def load(self, name: str) -> torch.Tensor:
        """A tensor that is read as it is used; it must not be written to."""
        import torch

        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[entry["dtype"]])
        raw = torch.tensor([], dtype=torch.uint8).set_(
            self._storage, self._start + begin, (end - begin,)
        )
        # Files of other writers may be unaligned; a view would be refused.
        raw = raw if (self._start + begin) % dtype.itemsize == 0 else raw.clone()
        shape = entry["shape"]
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise UnsupportedModelError(f"{self.path}: {name} has another size than its shape.")
        return raw.view(dtype).reshape(shape)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages. Views stay valid and read them again."""
        begin, end = self._entries[name]["data_offsets"]
        release_pages(self._storage.data_ptr() + self._start + begin, end - begin)

    @cached_property
    def _storage(self) -> Any:
        import torch

        size = self.path.stat().st_size
        return torch.UntypedStorage.from_file(str(self.path), False, size)
