"""From a checkpoint's tensors to ``.gguf`` files, one tensor at a time.

This module puts plan, types, vocabulary and bytes together.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import DiskSpaceError
from qlora_kit.exporters.gguf.conversion.file_plan import FileSettings, Plan, plan_conversion
from qlora_kit.exporters.gguf.conversion.header import write_header
from qlora_kit.exporters.gguf.conversion.origin import Origin
from qlora_kit.exporters.gguf.conversion.tensor_writer import PartFile, Progress, write_tensors
from qlora_kit.exporters.gguf.quantization.importance import ImportanceMatrix
from qlora_kit.exporters.gguf.tokenizer.comparison import check_vocabulary, check_written_name
from qlora_kit.exporters.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversion", "convert"]

logger = logging.getLogger(__name__)


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
            files: dict[tuple[str, str], PartFile] = {}
            for recipe in plan.recipes:
                for number, part in enumerate(parts[recipe.name]):
                    path = folder / part.name
                    write_header(
                        path, plan, recipe, vocabulary, model_name, origin or Origin(),
                        importance=importance, part=number,
                    )  # fmt: skip
                    file = stack.enter_context(PartFile(path))
                    files |= {(recipe.name, tensor.name): file for tensor in part.tensors}
            try:
                write_tensors(
                    source, plan, files, pool,
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
    paths = {recipe.name: folder / plan.file_name(recipe) for recipe in plan.recipes}
    notes = (*plan.description.notes, *plan.notes, *vocabulary.notes, *token_notes)
    return Conversion(paths, plan, vocabulary, texts, notes)


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
