"""Encoding tensors on every core, each worker writing its rows where they belong.

Every tensor is read and changed once, and encoded into each file that was asked for, so several
quantizations cost one merge and no intermediate file.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from qlora_kit.exporters.gguf.conversion.file_plan import Plan, count_tensor_bytes, round_up
from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor
from qlora_kit.exporters.gguf.quantization.blocks import cut_rows, encode_values, widen_piece
from qlora_kit.exporters.gguf.quantization.importance import ImportanceMatrix
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["PartFile", "Progress", "write_tensors"]

Progress = Callable[[str, int, int], None]

# What a worker does at once: enough that handing it over costs nothing.
_PIECES_PER_TASK: Final = 4
# Enough for workers never to wait, few enough to bound what is kept of tensors.
_TASKS_PER_WORKER: Final = 2


class PartFile:
    """A file whose header is written; tensors are written where they will be, in any order.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._end = round_up(path.stat().st_size)
        self._file = path.open("r+b", buffering=0)
        self._lock = threading.Lock()

    def reserve(self, size: int) -> int:
        """Where the next tensor begins, of so many bytes."""
        start, self._end = self._end, round_up(self._end + size)
        return start

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes; several threads may."""
        while data.nbytes:
            if hasattr(os, "pwrite"):
                done = os.pwrite(self._file.fileno(), data, offset)
            else:
                with self._lock:
                    self._file.seek(offset)
                    done = self._file.write(data)
            data, offset = data[done:], offset + done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            # What aligns tensors was never written and reads as zeros.
            self._file.truncate(self._end)
        self._file.close()


@dataclass(frozen=True)
class _Target:
    """Where a tensor goes in one file, and as what."""

    file: PartFile
    offset: int
    type_name: str


@dataclass(frozen=True)
class _Piece:
    """Some rows, how many of the tensor's numbers come before them, and what weighs them."""

    rows: torch.Tensor
    before: int
    importance: NDArray[np.float32] | None


def write_tensors(
    source: TensorSource,
    plan: Plan,
    files: Mapping[tuple[str, str], PartFile],
    pool: Executor,
    *,
    importance: ImportanceMatrix | None,
    threads: int,
    progress: Progress,
) -> None:
    """Read tensors one by one, and encode and write their rows on the pool.

    A few tasks per worker are under way at any time, also across tensors: the next tensor is
    read, and merged, while the last rows of the one before are being encoded.

    Args:
        source: The weights.
        plan: What becomes of them.
        files: By recipe and tensor.
        pool: The workers.
        importance: What guides the quantizer.
        threads: How many workers there are.
        progress: Called after each tensor.
    """
    pending: deque[Future[None]] = deque()
    total = len(plan.tensors)
    for done, planned in enumerate(plan.tensors, start=1):
        tensor = planned.load(source)
        targets = _place(planned, plan, files)
        pieces = _cut(tensor, planned.name, importance)
        for at in range(0, len(pieces), _PIECES_PER_TASK):
            while len(pending) >= _TASKS_PER_WORKER * threads:
                pending.popleft().result()
            task = pieces[at : at + _PIECES_PER_TASK]
            pending.append(pool.submit(_write_pieces, task, targets, planned.name))
        del tensor, pieces
        progress("writing GGUF", done, total)
    while pending:
        pending.popleft().result()


def _place(
    planned: PlannedTensor, plan: Plan, files: Mapping[tuple[str, str], PartFile]
) -> list[_Target]:
    targets = []
    for recipe in plan.recipes:
        file, kind = files[recipe.name, planned.name], plan.types[recipe.name][planned.name]
        targets.append(_Target(file, file.reserve(count_tensor_bytes(planned.shape, kind)), kind))
    return targets


def _cut(tensor: torch.Tensor, name: str, importance: ImportanceMatrix | None) -> list[_Piece]:
    columns = tensor.shape[-1]
    weights = None if importance is None else importance.weights(name)
    # Old importance matrices may hold something of the embeddings that does not fit them.
    if weights is not None and name == "token_embd.weight" and weights.size != columns:
        weights = None
    # A stack of experts has one row of importances each, (experts, columns).
    rows_of = None if weights is None else weights.reshape(-1, columns)
    pieces, before = [], 0
    for matrix, rows in cut_rows(tensor, 1 if rows_of is None else len(rows_of)):
        pieces.append(_Piece(rows, before, None if rows_of is None else rows_of[matrix]))
        before += rows.numel()
    return pieces


def _write_pieces(pieces: Sequence[_Piece], targets: Sequence[_Target], name: str) -> None:
    for piece in pieces:
        values = widen_piece(piece.rows, name)
        for target in targets:
            encoded: NDArray[Any] = encode_values(values, target.type_name, name, piece.importance)
            before = count_tensor_bytes((piece.before,), target.type_name)
            target.file.write(encoded.data.cast("B"), target.offset + before)
