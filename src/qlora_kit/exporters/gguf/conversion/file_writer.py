"""From a checkpoint's tensors to ``.gguf`` files, one tensor at a time.

Every tensor is read and changed once, and encoded into each file that was asked for, so
several quantizations cost one merge and no intermediate file. This module puts plan, types,
vocabulary and bytes together.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from qlora_kit.errors import DiskSpaceError
from qlora_kit.exporters.gguf.conversion.file_plan import (
    FileSettings,
    Plan,
    pad,
    plan_conversion,
)
from qlora_kit.exporters.gguf.conversion.header import write_header
from qlora_kit.exporters.gguf.conversion.origin import Origin
from qlora_kit.exporters.gguf.quantization.blocks import cut_rows, encode_piece
from qlora_kit.exporters.gguf.quantization.importance import ImportanceMatrix
from qlora_kit.exporters.gguf.tokenizer.comparison import check_vocabulary, check_written_name
from qlora_kit.exporters.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversion", "convert"]

logger = logging.getLogger(__name__)

# Enough for workers never to wait for the writer, few enough to bound memory.
_PIECES_PER_WORKER: Final = 4

Progress = Callable[[str, int, int], None]


def _ignore_progress(what: str, done: int, total: int) -> None:
    """Progress nobody asked to see."""


@dataclass(frozen=True)
class Conversion:
    """Files that were written.

    Attributes:
        files: Path of each file, by recipe name; of a split one, the first part.
        plan: What was planned.
        vocabulary: The vocabulary written.
        tokenizer_texts: Number of texts the tokenizer was compared on.
        notes: What the user should know, one sentence each.
    """

    files: Mapping[str, Path]
    plan: Plan
    vocabulary: Vocabulary
    tokenizer_texts: int
    notes: tuple[str, ...] = field(default=())


def convert(
    source: TensorSource,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    quantization: str | Iterable[str] = "q8_0",
    name: str = "model",
    threads: int | None = None,
    progress: Progress = _ignore_progress,
    stop_token_ids: Sequence[int] = (),
    origin: Origin | None = None,
    settings: FileSettings | None = None,
    importance: ImportanceMatrix | None = None,
) -> Conversion:
    """Write one ``.gguf`` file per quantization.

    Args:
        source: The weights, under their Hugging Face names.
        config: ``config.json`` as a dictionary, of transformers 4 or 5.
        tokenizer: The fast tokenizer that belongs to them.
        folder: Where the files go; it must exist.
        quantization: One or more names of :data:`~.recipes.RECIPES`.
        name: ``general.name``, and the beginning of the files' names.
        threads: Workers that encode; all cores by default.
        progress: Called as ``progress(what, done, total)`` after each tensor.
        stop_token_ids: Every token that ends an answer, the tokenizer's own first.
        origin: What the files say about where the model comes from.
        settings: Types by tensor, and into how many files.
        importance: What guides the quantizer.

    Returns:
        What was written. On any failure the files are removed.

    Raises:
        ConfigError: When a quantization is unknown.
        DiskSpaceError: When the disk is full.
        ExportError: When a weight cannot be stored.
        MissingDependencyError: When a type cannot be encoded with what is installed.
        UnsupportedModelError: When llama.cpp would run the model, or tokenize, differently.
    """
    settings = settings or FileSettings()
    if importance is not None:
        settings = replace(settings, is_guided=importance.entries.__contains__)
    plan = plan_conversion(source, config, quantization=quantization, name=name, settings=settings)
    if importance is not None:
        importance.check({tensor.name: tensor.shape for tensor in plan.tensors})
    vocabulary = read_vocabulary(tokenizer, plan.vocabulary_size, stop_token_ids)
    model_name = check_written_name(name, vocabulary)
    texts, token_notes = check_vocabulary(vocabulary, tokenizer)
    parts = {recipe.name: plan.parts(recipe) for recipe in plan.recipes}
    workers = threads or _count_cores()
    try:
        with (
            contextlib.ExitStack() as stack,
            ThreadPoolExecutor(workers) as pool,
        ):
            handles: dict[tuple[str, str], IO[bytes]] = {}
            for recipe in plan.recipes:
                for number, part in enumerate(parts[recipe.name]):
                    path = folder / part.name
                    write_header(
                        path, plan, recipe, vocabulary, model_name, origin or Origin(),
                        importance=importance, part=number,
                    )  # fmt: skip
                    handle = stack.enter_context(path.open("ab"))
                    pad(handle)
                    handles |= {(recipe.name, tensor.name): handle for tensor in part.tensors}
            try:
                _write_tensors(
                    source, plan, handles, pool,
                    importance=importance, threads=workers, progress=progress,
                )  # fmt: skip
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BaseException as error:
        for part in itertools.chain.from_iterable(parts.values()):
            (folder / part.name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(plan.data_bytes(recipe) for recipe in plan.recipes) / 2**30
            raise DiskSpaceError(
                f"The disk of {folder} is full; {', '.join(parts)} need {needed:.2f} GiB there."
            ) from error
        raise
    files = {recipe.name: folder / plan.file_name(recipe) for recipe in plan.recipes}
    notes = (*plan.description.notes, *plan.notes, *vocabulary.notes, *token_notes)
    return Conversion(files, plan, vocabulary, texts, notes)


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write_tensors(
    source: TensorSource,
    plan: Plan,
    handles: Mapping[tuple[str, str], IO[bytes]],
    pool: Executor,
    *,
    importance: ImportanceMatrix | None,
    threads: int,
    progress: Progress,
) -> None:
    """Encode pieces on the pool and write them in order.

    A few pieces per worker are under way at any time, also across tensors: the next tensor is
    read, and merged, while the last pieces of the one before are being encoded.
    """
    pending: deque[tuple[IO[bytes], Future[NDArray[Any]], bool]] = deque()

    def write_oldest() -> None:
        handle, piece, ends_tensor = pending.popleft()
        handle.write(piece.result().data)
        if ends_tensor:
            pad(handle)

    # First in, first out over all files at once: each handle sees its pieces in file order,
    # whichever worker finishes first, and what waits is bounded by the deque alone.
    total = len(plan.tensors)
    for done, planned in enumerate(plan.tensors, start=1):
        tensor = planned.load(source)
        columns = tensor.shape[-1]
        weights = None if importance is None else importance.weights(planned.name)
        # Old importance matrices may hold something of the embeddings that does not fit them.
        if weights is not None and planned.name == "token_embd.weight" and weights.size != columns:
            weights = None
        # A stack of experts has one row of importances each, (experts, columns).
        rows_of = None if weights is None else weights.reshape(-1, columns)
        for recipe in plan.recipes:
            handle = handles[recipe.name, planned.name]
            type_name = plan.types[recipe.name][planned.name]
            pieces = list(cut_rows(tensor, 1 if rows_of is None else len(rows_of)))
            for number, (matrix, rows) in enumerate(pieces, start=1):
                while len(pending) >= _PIECES_PER_WORKER * threads:
                    write_oldest()
                own = None if rows_of is None else rows_of[matrix]
                future = pool.submit(encode_piece, rows, type_name, planned.name, own)
                pending.append((handle, future, number == len(pieces)))
        progress("writing GGUF", done, total)
    while pending:
        write_oldest()
