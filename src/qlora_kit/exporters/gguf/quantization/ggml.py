"""ggml's own quantizers, called through ctypes, and what stands in where they are absent.

``libggml-python`` ships ggml as a shared library; ``ggml_quantize_chunk`` releases the GIL, so
a thread pool uses every core. Without it, the ``gguf`` package's numpy encoder covers the
types it knows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import MissingDependencyError
from qlora_kit.exporters.gguf.quantization.recipes import BLOCK_SIZES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "check_encoder",
    "encode_rows",
    "find_missing_encoder",
    "row_size",
    "type_number",
    "widen_bf16",
]

logger = logging.getLogger(__name__)

#: Types that ``gguf.quants`` encodes itself, byte for byte like ggml.
_NUMPY_TYPES: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")

_INSTALL: Final = "pip install 'qlora-kit[gguf]'"


def type_number(type_name: str) -> int:
    """Ggml's number of a type, as the file format stores it."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[type_name])


def row_size(type_name: str, columns: int) -> int:
    """Bytes that one row of ``columns`` numbers takes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    size_of_row: int = columns // block * size
    return size_of_row


def check_encoder(type_names: set[str], *, has_importance: bool = False) -> None:
    """Refuse types that nothing installed here can encode.

    Args:
        type_names: Types of the tensors to be written.
        has_importance: Whether an importance matrix guides the encoder; only ggml takes one.

    Raises:
        MissingDependencyError: Names the package to install.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"Writing GGUF needs the gguf package: {_INSTALL}.") from error
    wanted = {name for name in type_names if BLOCK_SIZES[name] > 1}
    if wanted <= set(_NUMPY_TYPES) and not has_importance:
        return
    _load_library()


def find_missing_encoder() -> list[str]:
    """What keeps every type from being written here, one phrase each."""
    try:
        check_encoder(set())
    except MissingDependencyError as error:
        return [str(error)]
    return []


def encode_rows(
    rows: NDArray[np.float32], type_name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize rows.

    Args:
        rows: Contiguous float32, shape (rows, columns); columns a multiple of the block size.
        type_name: A block type, such as ``"Q4_K"``.
        importance: How much each column matters, contiguous float32, shape (columns,).

    Returns:
        Bytes of shape (rows, row_size).
    """
    import numpy as np

    count, columns = rows.shape
    try:
        library = _load_library()
    except MissingDependencyError:
        if type_name not in _NUMPY_TYPES or importance is not None:
            raise
        return _encode_with_numpy(rows, type_name)
    out = np.empty((count, row_size(type_name, columns)), dtype=np.uint8)
    # ggml_quantize_chunk(type, src, dst, first number, rows, columns, importances) of ggml.c. It
    # quantizes whole rows and no block looks at another, so pieces give the bytes of the whole.
    written = library.ggml_quantize_chunk(
        type_number(type_name),
        rows.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        count,
        columns,
        None if importance is None else importance.ctypes.data_as(ctypes.c_void_p),
    )
    if written != out.nbytes:
        raise MissingDependencyError(
            f"ggml wrote {written} bytes of {type_name} where {out.nbytes} are expected; the "
            f"installed libggml-python does not fit. Reinstall it: {_INSTALL}."
        )
    return out


def widen_bf16(rows: torch.Tensor, out: NDArray[np.float32]) -> bool:
    """Write bfloat16 numbers as float32 in one thread; torch would start threads of its own.

    Returns:
        Whether that was done: not without ggml.
    """
    try:
        library = _load_library()
    except MissingDependencyError:
        return False
    library.ggml_bf16_to_fp32_row(
        rows.data_ptr(), out.ctypes.data_as(ctypes.c_void_p), rows.numel()
    )
    return True


def _encode_with_numpy(rows: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType, quants

    encoded: NDArray[np.uint8] = quants.quantize(rows, GGMLQuantizationType[type_name])
    return encoded


@functools.cache
def _load_library() -> Any:
    """Ggml's base library, checked against the sizes that the gguf package believes in.

    Raises:
        MissingDependencyError: When it is not there, does not load, or disagrees.
    """
    path = _find_library()
    if path is None:
        raise MissingDependencyError(
            "K-quants, iq types and importance matrices are ggml's, from the package "
            f"libggml-python: {_INSTALL}. Without it these types can be written, unguided: f32, "
            f"f16, bf16, {', '.join(_NUMPY_TYPES).lower()}."
        )
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        library.ggml_bf16_to_fp32_row.restype = None
        library.ggml_bf16_to_fp32_row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        library.ggml_type_name.restype = ctypes.c_char_p
        library.ggml_type_name.argtypes = [ctypes.c_int]
        library.ggml_row_size.restype = ctypes.c_size_t
        library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path} cannot be used: {error}. Reinstall libggml-python: {_INSTALL}."
        ) from error
    _check_layout(library, path)
    logger.debug("Quantizing with %s", path)
    return library


def _check_layout(library: Any, path: Path) -> None:
    for name in (name for name, size in BLOCK_SIZES.items() if size > 1):
        number = type_number(name)
        said = library.ggml_type_name(number).decode()
        size = library.ggml_row_size(number, 1024)
        if said.lower() != name.lower() or size != row_size(name, 1024):
            raise MissingDependencyError(
                f"{path} calls type {number} {said!r} with {size} bytes per 1024 numbers, and "
                f"the gguf package {name!r} with {row_size(name, 1024)}. Update both: {_INSTALL}."
            )


def _find_library() -> Path | None:
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    pattern = {"win32": "ggml-base*.dll", "darwin": "libggml-base*.dylib"}.get(
        sys.platform, "libggml-base.so*"
    )
    return min(root.rglob(pattern), key=lambda path: len(path.name), default=None)
