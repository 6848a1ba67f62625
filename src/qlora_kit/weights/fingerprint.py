"""What a checkpoint's weights say: numbers that are none are refused, and all have a fingerprint.

Every byte is read once, at the speed of memory, while the files come from disk anyway.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.weights.mapped_file import TORCH_DTYPES
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["fingerprint_weights", "stamp_files"]

_WHOLE_NUMBERS: Final = ("int64", "int32", "int16", "int8", "uint8", "bool")
#: Bytes of a tensor that are looked at together, few enough to stay in a processor's cache.
_BLOCK_BYTES: Final = 1 << 20
_MOST_THREADS: Final = 8

#: The bits that are all set in infinite numbers and NaN alone, and the words that hold them.
_EXPONENTS: Final = {
    "float64": (0x7FF0_0000_0000_0000, "<u8"),
    "float32": (0x7F80_0000, "<u4"),
    "bfloat16": (0x7F80, "<u2"),
    "float16": (0x7C00, "<u2"),
    "float8_e5m2": (0x7C, "u1"),
    "float8_e4m3fn": (0x7F, "u1"),
}


def fingerprint_weights(folder: Path, *, is_quantized: bool) -> str:
    """A fingerprint of every tensor's name, shape, dtype and content.

    How tensors are spread over files does not matter; a single changed number does.

    Args:
        folder: A checkpoint in safetensors format.
        is_quantized: Whether weights are packed into whole numbers.

    Raises:
        UnsupportedModelError: When a weight is infinite, not a number, or a whole number where
            floating-point numbers belong.
    """
    with SafetensorsSource(folder) as source:
        names = sorted(source.names())
        if not is_quantized:
            _refuse_whole_numbers(source, names)
        workers = min(_MOST_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, "qlora_kit-weights") as pool:
            parts = list(pool.map(lambda name: _read(source, name), names))
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def stamp_files(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether files changed, by name.

    Size and time of change, in nanoseconds, of each weight file; size and checksum of
    ``config.json``, which costs nothing to read.
    """
    stats = {file.name: file.stat() for file in sorted(folder.glob("*.safetensors"))}
    stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    config = folder / "config.json"
    if config.is_file():
        content = config.read_bytes()
        stamps[config.name] = (len(content), zlib.crc32(content))
    return stamps


def _refuse_whole_numbers(source: SafetensorsSource, names: list[str]) -> None:
    for name in names:
        dtype = TORCH_DTYPES.get(source.dtype(name), source.dtype(name))
        # Masks and positions, which some models keep beside their weights, are whole numbers.
        is_weight = name.endswith(".weight") and len(source.shape(name)) > 1
        if is_weight and dtype in _WHOLE_NUMBERS:
            raise UnsupportedModelError(
                f"{source.folder} holds {name} as whole numbers ({dtype}), and its config.json "
                "names no quantization that would explain them. Start from the model's 16-bit "
                "checkpoint."
            )


def _read(source: SafetensorsSource, name: str) -> str:
    """One tensor's part of the fingerprint, after a look at its numbers."""
    import torch

    tensor = source.load(name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    # numpy: torch's own threads cannot be begun by several at once in a process that was forked.
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    total = 0
    for number, start in enumerate(range(0, len(raw), _BLOCK_BYTES)):
        block = raw[start : start + _BLOCK_BYTES]
        # Odd factors, so that blocks that changed places change the sum.
        total += (2 * number + 1) * _sum_words(block)
        if dtype in _EXPONENTS and not _is_finite(block, dtype):
            raise UnsupportedModelError(
                f"{source.folder} is damaged: {name} holds numbers that are infinite or not a "
                "number (NaN). Download the model again."
            )
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {total % 2**64}\n"


def _sum_words(block: npt.NDArray[np.uint8]) -> int:
    """The block's bytes as little-endian 64-bit words, summed: exact, in any order."""
    whole = len(block) // 8 * 8
    rest = int.from_bytes(block[whole:].tobytes(), "little")
    return int(block[:whole].view("<u8").sum(dtype="u8")) + rest


def _is_finite(block: npt.NDArray[np.uint8], dtype: str) -> bool:
    exponent, word = _EXPONENTS[dtype]
    return bool(((block.view(word) & exponent) != exponent).all())
