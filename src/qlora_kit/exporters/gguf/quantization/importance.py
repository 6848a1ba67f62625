"""Importance matrices: how much each input of a matrix matters, as llama.cpp keeps them.

An entry holds, for every column of a matrix, the sum of the squares of what was multiplied with
it, and over how many tokens; experts have one row and one count each. ``llama-imatrix`` writes
them as GGUF (``tools/imatrix/imatrix.cpp``) and once wrote a format of its own, ``.dat``; both
are read as ``llama-quantize`` reads them (``common/imatrix-loader.cpp``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from qlora_kit.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Importance", "ImportanceMatrix", "read_importance", "write_importance"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_GGUF_MAGIC: Final = b"GGUF"

# A name or a row longer than this is no name or row, but a file of another kind.
_LONGEST: Final = 1 << 26


@dataclass
class Importance:
    """One matrix's.

    Attributes:
        sums: Sums of squared inputs, shape (matrices, columns); experts are several matrices.
        counts: Tokens that each was summed over, shape (matrices,); of a ``.dat`` file, the
            number of its chunks.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]

    def weights(self) -> NDArray[np.float32]:
        """Mean squares, and 1 for an expert that no token reached, shape (matrices, columns)."""
        import numpy as np

        # In float32, as llama-quantize divides.
        counts = self.counts.astype(np.float32)[:, None]
        reached = counts > 0
        means = self.sums / np.where(reached, counts, np.float32(1))
        return np.where(reached, means, np.float32(1)).astype(np.float32)


@dataclass
class ImportanceMatrix:
    """All of a model's.

    Attributes:
        entries: By GGUF name of the matrix.
        datasets: What it was computed on.
        chunk_count: How many chunks of text that was.
        chunk_size: Tokens of a chunk; 0 where unknown.
        path: The file it was read from, if any.
    """

    entries: dict[str, Importance]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    path: Path | None = None
    _weights: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    def weights(self, name: str) -> NDArray[np.float32] | None:
        """What ggml's quantizer takes for a matrix, or ``None`` where nothing is known of it."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if name not in self._weights:
            self._weights[name] = entry.weights()
        return self._weights[name]

    def check(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a matrix that is another model's.

        Args:
            tensors: Shapes of the file's tensors, rows first.

        Raises:
            ConfigError: When no name fits, a width does not, or a number is not finite.
        """
        import numpy as np

        where = f"The importance matrix {self.path or ''}".rstrip()
        if not set(self.entries) & set(tensors):
            raise ConfigError(
                f"{where} is of another model: it has {_first(self.entries)}, and this model "
                f"{_first(tensors)}."
            )
        for name, entry in self.entries.items():
            if not np.isfinite(entry.sums).all() or (entry.sums < 0).any():
                raise ConfigError(f"{where} holds numbers for {name} that are no sums of squares.")
            if name not in tensors or name == "token_embd.weight":
                continue
            shape = tensors[name]
            wanted = (shape[0] if len(shape) > 2 else 1) * shape[-1]
            if entry.sums.size != wanted:
                raise ConfigError(
                    f"{where} is of another model: {name} has {entry.sums.size} entries there "
                    f"and {wanted} here."
                )


def _first(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:2]) or "nothing"


def read_importance(path: Path) -> ImportanceMatrix:
    """Read a ``.gguf`` or ``.dat`` file of ``llama-imatrix``.

    Raises:
        ConfigError: When it is none.
    """
    try:
        with path.open("rb") as handle:
            is_gguf = handle.read(4) == _GGUF_MAGIC
            if not is_gguf:
                handle.seek(0)
                return _read_legacy(handle, path)
    except OSError as error:
        raise ConfigError(f"The importance matrix {path} cannot be read: {error}") from error
    return _read_gguf(path)


def _read_gguf(path: Path) -> ImportanceMatrix:
    import numpy as np
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise ConfigError(f"The importance matrix {path} cannot be read: {error}") from error
    found = {tensor.name: tensor for tensor in reader.tensors}
    stems = {name.removesuffix(_SUMS) for name in found if name.endswith(_SUMS)}
    if not stems:
        raise ConfigError(
            f"{path} is a GGUF file and no importance matrix: it has no tensor called "
            f"'...{_SUMS}'. llama-imatrix writes one, and so does imatrix=True."
        )
    entries = {}
    for stem in sorted(stems):
        counts = found.get(stem + _COUNTS)
        if counts is None:
            raise ConfigError(f"{path} has sums for {stem} and no counts; it is damaged.")
        number = counts.data.reshape(-1)
        sums = np.array(found[stem + _SUMS].data, dtype=np.float32)
        if sums.size % number.size:
            raise ConfigError(f"{path} has {number.size} counts for {sums.size} sums of {stem}.")
        entries[stem] = Importance(
            sums.reshape(number.size, -1), np.rint(number.astype(np.float64)).astype(np.int64)
        )

    def value(key: str, default: Any) -> Any:
        stored = reader.get_field(key)
        return default if stored is None else stored.contents()

    return ImportanceMatrix(
        entries,
        tuple(value("imatrix.datasets", ())),
        int(value("imatrix.chunk_count", 0)),
        int(value("imatrix.chunk_size", 0)),
        path,
    )


def _read_legacy(handle: IO[bytes], path: Path) -> ImportanceMatrix:
    import numpy as np

    def read(count: int) -> bytes:
        data = handle.read(count) if 0 <= count <= _LONGEST else b""
        if len(data) != count:
            raise ConfigError(
                f"{path} is no importance matrix, neither GGUF nor the older .dat, or it is cut "
                "short. llama-imatrix writes one, and so does imatrix=True."
            )
        return data

    def number() -> int:
        return int(struct.unpack("<i", read(4))[0])

    entries = {}
    for _ in range(number()):
        name = read(number()).decode("utf-8", errors="replace")
        calls, size = number(), number()
        sums = np.frombuffer(read(4 * size), dtype="<f4").astype(np.float32)
        entries[name] = Importance(sums[None], np.array([calls], dtype=np.int64))
    if not entries:
        raise ConfigError(f"{path} is no importance matrix: it has no entries.")
    # How many chunks, and the text file's name, stand at the end of newer files only.
    rest = handle.read()
    chunks = struct.unpack("<i", rest[:4])[0] if len(rest) >= 4 else 0
    dataset = rest[8:].decode("utf-8", errors="replace").rstrip("\0")
    return ImportanceMatrix(entries, (dataset,) if dataset else (), chunks, 0, path)


def write_importance(path: Path, matrix: ImportanceMatrix) -> None:
    """Write GGUF as ``llama-imatrix`` does."""
    import numpy as np
    from gguf import GGUFWriter

    # llama-imatrix's file states no architecture; GGUFWriter would always write one.
    writer = GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets) or [""])
    writer.add_uint32("imatrix.chunk_count", matrix.chunk_count)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, dtype=np.float32))
        writer.add_tensor(name + _COUNTS, entry.counts.astype(np.float32)[:, None])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
