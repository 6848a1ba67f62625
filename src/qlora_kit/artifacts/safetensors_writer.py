"""Writing safetensors shards tensor by tensor.

Names, shapes and dtypes are known before any weight is read, so the header is written
first and the tensors follow as they come, hashed on the way. ``safetensors.save_file``
needs a whole shard in memory instead. The file format is described in the safetensors
README: eight bytes of header length, the JSON header, the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

from qlora_kit.errors import ConfigError, ExportError, UnsupportedModelError
from qlora_kit.weights.mapped_file import TORCH_DTYPES

if TYPE_CHECKING:
    import torch

__all__ = [
    "TypedSource",
    "WrittenTensors",
    "count_bytes",
    "parse_size",
    "plan_shards",
    "write_tensors",
]

_NAMES_IN_FILES: Final = {ours: theirs for theirs, ours in TORCH_DTYPES.items()}

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
                 "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip

#: The widest dtype's size; also what the length of a header is padded to.
_ALIGNMENT: Final = 8

# Tensors that may wait between merging and writing; two keep both sides busy.
_QUEUE: Final = 2

_PARALLEL_SHARDS: Final = 2

Progress = Callable[[str, int, int], None]


class TypedSource(Protocol):
    """A ``TensorSource`` that also knows its dtypes."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype_of(self, name: str) -> torch.dtype: ...
    def load(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class WrittenTensors:
    """Files written, with their sha256, and the tensors' total size in bytes."""

    sha256: Mapping[str, str]
    total_size: int


def parse_size(size: int | str) -> int:
    """``"5GB"`` or ``"500MiB"`` or a number -> bytes.

    Raises:
        ConfigError: When it is not a size, or is below 1 MB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if match is None or match[2] not in _UNITS or isinstance(size, bool):
        raise ConfigError(f"max_shard_size is a size such as '5GB' or '500MB', got {size!r}.")
    parsed = int(float(match[1]) * _UNITS[match[2]])
    if parsed < 10**6:
        raise ConfigError(f"max_shard_size must be at least 1MB, got {size!r}.")
    return parsed


def count_bytes(source: TypedSource, name: str) -> int:
    """Size of one tensor in a file."""
    return math.prod(source.shape(name)) * int(source.dtype_of(name).itemsize)


def plan_shards(source: TypedSource, max_shard_size: int) -> list[list[str]]:
    """Tensor names per shard, in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in source.names():
        size = count_bytes(source, name)
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_tensors(
    source: TypedSource,
    folder: Path,
    *,
    max_shard_size: int,
    progress: Progress,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> WrittenTensors:
    """Write every tensor of a source as ``model.safetensors`` or as shards with an index.

    Args:
        source: Where tensors come from; each is asked for once, in order within a shard, and
            for two shards at a time.
        folder: An existing folder.
        max_shard_size: Bytes per shard.
        progress: Called with ``("writing tensors", done, total)``, in bytes.
        metadata: Extra strings for the headers; ``format: pt`` is always there.
        stem: What file names begin with.
    """
    shards = plan_shards(source, max_shard_size)
    total = sum(count_bytes(source, name) for shard in shards for name in shard)
    count = len(shards)
    files = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    contents = {"format": "pt", **(metadata or {})}
    hashes = _write_shards(
        {folder / file: names for file, names in zip(files, shards, strict=True)},
        lambda path, names, report: _write_shard(path, source, names, contents, report),
        lambda done: progress("writing tensors", done, total),
    )
    if count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return WrittenTensors(hashes, total)


def _write_shards(
    shards: Mapping[Path, Sequence[str]],
    write: Callable[[Path, Sequence[str], Callable[[int], None]], str],
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Write two shards at a time, telling progress from the caller's thread; hashes by file."""
    written: SimpleQueue[int | None] = SimpleQueue()
    is_stopped = threading.Event()

    def report(size: int) -> None:
        if is_stopped.is_set():
            raise ExportError("Another shard could not be written.")
        written.put(size)

    # One thread hashes 1 to 2 GB/s, less than a GPU merges and a good disk takes.
    with ThreadPoolExecutor(_PARALLEL_SHARDS, "qlora-kit-shard") as pool:
        parts = {path.name: pool.submit(write, path, names, report)
                 for path, names in shards.items()}  # fmt: skip
        try:
            done, unfinished = 0, len(parts)
            for part in parts.values():
                part.add_done_callback(lambda _: written.put(None))
            while unfinished:
                size = written.get()
                if size is None:
                    unfinished -= 1
                    # result() raises what the thread raised.
                    _ = [part.result() for part in parts.values() if part.done()]
                else:
                    done += size
                    progress(done)
        except BaseException:
            is_stopped.set()
            for part in parts.values():
                part.cancel()
            raise
        return {name: part.result() for name, part in parts.items()}


def _write_shard(
    path: Path,
    source: TypedSource,
    names: Sequence[str],
    metadata: Mapping[str, str],
    report: Callable[[int], None],
) -> str:
    ordered = _order(source, names)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in ordered:
        size = count_bytes(source, name)
        header[name] = {
            "dtype": _NAMES_IN_FILES[str(source.dtype_of(name)).removeprefix("torch.")],
            "shape": list(source.shape(name)),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file, _HashingWriter(file) as writer:
        writer.put(len(encoded).to_bytes(8, "little") + encoded)
        for name in ordered:
            tensor = source.load(name)
            if (tensor.shape, tensor.dtype) != (source.shape(name), source.dtype_of(name)):
                raise UnsupportedModelError(
                    f"{name} was announced as {source.shape(name)} {source.dtype_of(name)} and "
                    f"came as {tuple(tensor.shape)} {tensor.dtype}."
                )
            writer.put(_as_bytes(tensor))
            report(tensor.nbytes)
        return writer.finish()


def _order(source: TypedSource, names: Sequence[str]) -> list[str]:
    """An order that keeps every tensor aligned to its own size, as readers expect.

    It is the given one, so that tensors which are made together are asked for together;
    those that would misalign the next come last, wide dtypes first.
    """
    even = [name for name in names if count_bytes(source, name) % _ALIGNMENT == 0]
    odd = [name for name in names if count_bytes(source, name) % _ALIGNMENT]
    return even + sorted(odd, key=lambda name: -source.dtype_of(name).itemsize)


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory in row-major order, without a copy where it is so already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class _HashingWriter:
    """Writes and hashes on a thread each while the caller prepares the next tensor."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._lanes = [
            _Lane(ThreadPoolExecutor(1, "qlora-kit-write"), file.write),
            _Lane(ThreadPoolExecutor(1, "qlora-kit-hash"), self._digest.update),
        ]

    def __enter__(self) -> _HashingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.pool.shutdown(cancel_futures=True)

    def put(self, data: bytes | memoryview) -> None:
        for lane in self._lanes:
            lane.put(data)

    def finish(self) -> str:
        for lane in self._lanes:
            lane.drain(0)
        self._file.flush()
        # Now, while another shard is being written, rather than for all at the end.
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


@dataclass
class _Lane:
    """One thread that consumes pieces in order, a bounded number of them waiting."""

    pool: ThreadPoolExecutor
    consume: Callable[[Any], Any]
    waiting: deque[Future[Any]] = field(default_factory=deque)

    def put(self, data: bytes | memoryview) -> None:
        self.drain(_QUEUE - 1)
        self.waiting.append(self.pool.submit(self.consume, data))

    def drain(self, keep: int) -> None:
        # result() raises what the thread raised, a full disk for one.
        while len(self.waiting) > keep:
            self.waiting.popleft().result()
