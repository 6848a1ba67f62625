"""Rows that are token ids already, brought into the form that formatters make."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.data.sources.row_problems import BadRows, Location, RowProblem, settle_problems
from qlora_kit.data.tokens.encoding import EncodedExamples
from qlora_kit.data.tokens.encoding_report import explain_emptiness
from qlora_kit.data.tokens.truncation import (
    SHORTEN_ADVICE,
    check_limits,
    fit_examples,
    flatten_lists,
)
from qlora_kit.errors import DataError
from qlora_kit.messages import Setting
from qlora_kit.values import IGNORED_LABEL

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["take_tokenized"]

logger = logging.getLogger(__name__)

_SOURCE: Final = "the tokenized dataset"
#: Columns of TRL's tokenized datasets that say which tokens carry loss.
_LOSS_MASKS: Final = ("completion_mask", "assistant_masks")


def take_tokenized(
    rows: Any, *, max_length: int, truncation: str = "end", vocabulary_size: int | None = None
) -> EncodedExamples:
    """Check token ids of the user's own making, and fit them into ``max_length``.

    Args:
        rows: A ``datasets.Dataset`` or list of dictionaries with ``input_ids``. ``labels`` default
            to the ids, where ``completion_mask`` or ``assistant_masks`` is 1 if there is one.
            Tokens whose ``attention_mask`` is 0 are padding and are left out. Rows that
            :func:`pack_examples` made keep their ``seq_lengths``.
        max_length: Most tokens of a row.
        truncation: ``"end"``, ``"drop"`` or ``"error"``, as in :meth:`FormatterBase.encode`.
        vocabulary_size: How many token ids the model knows; not checked if ``None``.

    Raises:
        DataError: When ids or labels are malformed, packed rows are too long, or no row has a
            token to learn.
    """
    import numpy as np
    from datasets import Dataset

    check_limits(max_length, truncation)
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(_check_rows(rows))
    if not len(dataset):
        raise DataError("The dataset has no rows.")
    table = dataset.with_format("arrow")[:]
    ids, offsets = _read_column(table, "input_ids")
    lengths = np.diff(offsets)
    problems = {int(place): "input_ids is empty" for place in np.flatnonzero(lengths == 0)}
    columns = {}
    for name in ("labels", "attention_mask", *_LOSS_MASKS):
        if name in table.column_names:
            columns[name], own = _read_column(table, name)
            for place in np.flatnonzero(np.diff(own) != lengths):
                problems[int(place)] = (
                    f"{np.diff(own)[place]} {name} for {lengths[place]} input_ids"
                )
    _refuse(problems, len(dataset))
    labels = columns.get("labels")
    if labels is None:
        mask = next((columns[name] for name in _LOSS_MASKS if name in columns), None)
        labels = ids if mask is None else np.where(mask != 0, ids, np.int32(IGNORED_LABEL))
    _refuse(_find_strangers(ids, labels, offsets, vocabulary_size), len(dataset))
    if "seq_lengths" in table.column_names:
        return _take_packed(table, ids, labels, offsets, max_length, truncation)
    attention = columns.get("attention_mask")
    if attention is not None and not attention.all():
        is_real = attention != 0
        offsets = np.concatenate([[0], np.cumsum(is_real)])[offsets]
        ids, labels = ids[is_real], labels[is_real]
    fitted = fit_examples(ids, labels, offsets, max_length=max_length, truncation=truncation)
    if truncation == "error":
        _refuse_long(fitted.too_long, len(dataset), max_length)
    if not fitted.report.examples:
        raise DataError(*explain_emptiness(fitted.report, _SOURCE))
    level = logging.WARNING if fitted.report.has_losses else logging.INFO
    logger.log(level, "%s.", fitted.report)
    return EncodedExamples(Dataset(fitted.table), fitted.report)


def _find_strangers(
    ids: Any, labels: Any, offsets: Any, vocabulary_size: int | None
) -> dict[int, str]:
    """Rows with ids that the model does not know, which would fail in the middle of training."""
    import numpy as np

    limit = np.iinfo(np.int32).max if vocabulary_size is None else vocabulary_size
    known = "" if vocabulary_size is None else f", where the model has 0 to {limit - 1}"
    problems: dict[int, str] = {}
    for name, values in (("label", labels), ("token id", ids)):
        is_strange = (values < 0) | (values >= limit)
        if name == "label":
            is_strange &= values != IGNORED_LABEL
        for position in np.flatnonzero(is_strange)[::-1]:
            place = int(np.searchsorted(offsets, position, side="right")) - 1
            problems[place] = f"{name} {values[position]}{known}"
    return problems


def _check_rows(rows: Iterable[Any]) -> list[dict[str, Any]]:
    checked = list(rows)
    for place, row in enumerate(checked):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise DataError(f"Row {place + 1} is not a dictionary with input_ids: {row!r:.80}.")
    return [dict(row) for row in checked]


def _take_packed(
    table: pa.Table, ids: Any, labels: Any, offsets: Any, max_length: int, truncation: str
) -> EncodedExamples:
    """Packed rows as they are: a row that is too long cannot be cut without losing examples."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    sizes, size_offsets = _read_column(table, "seq_lengths")
    before = np.concatenate([[0], np.cumsum(sizes)])
    sums = before[size_offsets[1:]] - before[size_offsets[:-1]]
    lengths = np.diff(offsets)
    problems = {
        int(place): f"{lengths[place]} input_ids, but seq_lengths that add up to {sums[place]}"
        for place in np.flatnonzero(sums != lengths)
    }
    for position in np.flatnonzero(sizes < 1)[::-1]:
        place = int(np.searchsorted(size_offsets, position, side="right")) - 1
        problems[place] = f"seq_lengths must be at least 1 each, and one is {sizes[position]}"
    _refuse(problems, len(lengths))
    _refuse_long(
        [(int(place), int(lengths[place])) for place in np.flatnonzero(lengths > max_length)],
        len(lengths),
        max_length,
        advice=("Pack into rows of that length, or raise max_length.",),
    )
    labels = labels.copy()
    labels[before[:-1]] = IGNORED_LABEL
    # Rows without a trained token stay out as unpacked ones do.
    trained_before = np.concatenate([[0], np.cumsum(labels != IGNORED_LABEL)])
    is_kept = trained_before[offsets[1:]] > trained_before[offsets[:-1]]
    fitted = fit_examples(ids, labels, offsets, max_length=max_length, truncation=truncation)
    if not is_kept.any():
        raise DataError(*explain_emptiness(fitted.report, _SOURCE))
    packed = fitted.table.append_column(
        "seq_lengths", table["seq_lengths"].filter(pa.array(is_kept)).combine_chunks()
    )
    return EncodedExamples(Dataset(packed), fitted.report)


def _read_column(table: pa.Table, name: str) -> tuple[Any, Any]:
    """The values and offsets of a column of token ids or the like."""
    import pyarrow as pa

    column = table[name]
    try:
        values, offsets = flatten_lists(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(
            f"The column {name!r} must hold lists of whole numbers, one per token; it holds "
            f"{column.type} ({error})."
        ) from error
    if column.null_count or values.dtype.kind != "i":
        raise DataError(f"The column {name!r} has nulls where lists of token ids are expected.")
    return values, offsets


def _refuse(problems: Mapping[int, str], total: int) -> None:
    settle_problems(
        [RowProblem(Location(place), problems[place]) for place in sorted(problems)],
        total=total,
        source=_SOURCE,
        bad_rows=BadRows(),
        advice=("Correct them, or leave them out.",),
    )


def _refuse_long(
    too_long: list[tuple[int, int]],
    total: int,
    max_length: int,
    advice: Sequence[str | Setting] = SHORTEN_ADVICE,
) -> None:
    settle_problems(
        [
            RowProblem(Location(place), f"{length:,} tokens, the limit is {max_length:,}")
            for place, length in too_long
        ],
        total=total,
        source=_SOURCE,
        bad_rows=BadRows(),
        advice=advice,
    )
