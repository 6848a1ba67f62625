"""Rows to token ids and labels: the one place where it is decided what carries loss."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qlora_kit.data.cache import find_cached, make_key, store
from qlora_kit.data.collators import IGNORED_LABEL
from qlora_kit.data.problems import RowProblem, settle_problems
from qlora_kit.data.report import EncodingReport
from qlora_kit.data.segments import Segment
from qlora_kit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from qlora_kit.data.formatter import FormatterBase
    from qlora_kit.data.rows import Rows

__all__ = ["EncodedExamples", "EncodingReport", "encode_rows", "join_segments"]

logger = logging.getLogger(__name__)

_BATCH: Final = 1000
_CACHED_FROM: Final = 2000
_TRUNCATIONS: Final = ("end", "drop", "error")


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as tokens.

    Attributes:
        dataset: Rows with ``input_ids`` and ``labels``, lists of ints of the same length;
            labels are -100 where there is no loss, at the first token always.
        report: What became of the rows.
    """

    dataset: Dataset
    report: EncodingReport

    def __len__(self) -> int:
        return len(self.dataset)


class _Batch(NamedTuple):
    table: Any
    report: EncodingReport
    too_long: list[tuple[int, int]]
    problems: list[RowProblem]


def join_segments(
    formatter: FormatterBase, examples: Sequence[Sequence[Segment]], *, is_open: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Tokenize each segment by itself and join the ids.

    Args:
        formatter: Says which tokens begin and end an example, and what carries loss.
        examples: The segments of each example.
        is_open: Leave the end token out: the example is a prompt.

    Returns:
        The ids of each example, and for each id whether it carries loss.
    """
    text = formatter.text
    texts: list[str] = []
    continues: list[bool] = []
    for segments in examples:
        before: bool | None = None
        for segment in segments:
            if not segment.is_special:
                texts.append(segment.text)
                continues.append(bool(before))
            before = not (segment.is_special and text.marks_after_special)
    encoded = iter(text.encode_texts(texts, continues))
    special = {
        name: text.get_token_id(name)
        for name in {s.text for segments in examples for s in segments if s.is_special}
    }
    prefix = text.prefix_ids if formatter.adds_bos else []
    trains_all = not formatter.response_only
    joined = []
    for segments in examples:
        ids: list[int] = []
        trained: list[bool] = []
        first = segments[0] if segments else None
        if first is None or not first.is_special or special[first.text] not in prefix:
            ids += prefix
            trained += [trains_all] * len(prefix)
        for segment in segments:
            piece = [special[segment.text]] if segment.is_special else next(encoded)
            ids += piece
            trained += [segment.is_trained or trains_all] * len(piece)
        if formatter.adds_eos and not is_open:
            ids.append(formatter.eos_token_id)
            trained.append(True)
        if trained:
            trained[0] = False
        joined.append((ids, trained))
    return joined


def encode_rows(
    formatter: FormatterBase,
    rows: Rows,
    *,
    max_length: int,
    truncation: str = "end",
    num_proc: int | None = None,
    cache: bool | None = None,
) -> EncodedExamples:
    """Turn rows into token ids and labels; see :meth:`FormatterBase.encode`."""
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
        raise ConfigError(f"max_length must be at least 2 tokens, got {max_length!r}.")
    if truncation not in _TRUNCATIONS:
        raise ConfigError(f"truncation must be 'end', 'drop' or 'error', got {truncation!r}.")
    if num_proc is not None and (not isinstance(num_proc, int) or num_proc < 1):
        raise ConfigError(f"num_proc must be at least 1, got {num_proc!r}.")
    if not len(rows):
        raise DataError(f"{rows.source} has no rows.")
    start = time.perf_counter()
    key = None
    if cache if cache is not None else len(rows) >= _CACHED_FROM:
        key = make_key(rows.fingerprint, formatter.fingerprint, str(max_length), truncation)
        cached = find_cached(key)
        if cached is not None:
            dataset, values = cached
            report = EncodingReport(**values)
            report = replace(report, is_cached=True, seconds=time.perf_counter() - start)
            _log(report)
            return EncodedExamples(dataset, report)
    batches = list(_encode_all(formatter, rows, max_length, truncation, num_proc))
    report = EncodingReport.add_up([batch.report for batch in batches])
    report = replace(report, seconds=time.perf_counter() - start)
    _check_outcome(formatter, rows, batches, report)
    dataset = _make_dataset(batches)
    if key is not None:
        dataset = store(key, dataset, asdict(report))
    _log(report)
    return EncodedExamples(dataset, report)


def _encode_all(
    formatter: FormatterBase, rows: Rows, max_length: int, truncation: str, num_proc: int | None
) -> Iterator[_Batch]:
    from tqdm import tqdm

    starts = range(0, len(rows), _BATCH)
    processes = min(_choose_processes(formatter, len(rows), num_proc), len(starts))
    jobs = ((formatter, rows[s : s + _BATCH], s, max_length, truncation) for s in starts)
    # disable=None: only where someone watches.
    with tqdm(
        total=len(rows), desc="Tokenizing", unit="row", disable=None if len(starts) > 1 else True
    ) as progress:
        if processes == 1:
            for job in jobs:
                yield _encode_batch(job)
                progress.update(len(job[1]))
            return
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for batch in pool.imap(_encode_batch, jobs):
                yield batch
                progress.update(batch.report.rows)


def _choose_processes(formatter: FormatterBase, rows: int, num_proc: int | None) -> int:
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if num_proc is not None:
        return num_proc
    if formatter.text.is_fast or rows < _CACHED_FROM:
        return 1
    return os.cpu_count() or 1


def _encode_batch(job: tuple[FormatterBase, Rows, int, int, str]) -> _Batch:
    import numpy as np
    import pyarrow as pa

    formatter, rows, first, max_length, truncation = job
    all_ids: list[int] = []
    all_trained: list[bool] = []
    lengths: list[int] = []
    too_long: list[tuple[int, int]] = []
    truncated = dropped = without = lost = longest = 0
    segments: list[Sequence[Segment]] = []
    places: list[int] = []
    problems: list[RowProblem] = []
    for index, row in enumerate(rows):
        try:
            segments.append(formatter.segments(row))
            places.append(first + index)
        except DataError as error:
            problems.append(RowProblem(rows.get_location(index), str(error)))
    for index, (whole_ids, whole_trained) in zip(
        places, join_segments(formatter, segments), strict=True
    ):
        ids, trained = whole_ids, whole_trained
        longest = max(longest, len(ids))
        if len(ids) > max_length:
            too_long.append((index, len(ids)))
            if truncation != "end":
                dropped += 1
                lost += len(ids)
                continue
            if any(trained[:max_length]):
                truncated += 1
                lost += len(ids) - max_length
                ids, trained = ids[:max_length], trained[:max_length]
        if not any(trained[:max_length]):
            without += 1
            lost += len(ids)
            continue
        all_ids += ids
        all_trained += trained
        lengths.append(len(ids))
    values = np.array(all_ids, dtype=np.int32)
    labels = np.where(np.array(all_trained, dtype=bool), values, np.int32(IGNORED_LABEL))
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    table = pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            "labels": pa.ListArray.from_arrays(pa.array(offsets), pa.array(labels)),
        }
    )
    report = EncodingReport(
        rows=len(rows),
        examples=len(lengths),
        truncated=truncated,
        dropped=dropped,
        without_trained_tokens=without,
        tokens=len(all_ids),
        trained_tokens=sum(all_trained),
        lost_tokens=lost,
        longest=longest,
        max_length=max_length,
        truncation=truncation,
        unusable=len(problems),
    )
    return _Batch(table, report, too_long, problems)


def _make_dataset(batches: Sequence[_Batch]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    return Dataset(pa.concat_tables([batch.table for batch in batches]))


def _check_outcome(
    formatter: FormatterBase, rows: Rows, batches: Sequence[_Batch], report: EncodingReport
) -> None:
    settle_problems(
        [problem for batch in batches for problem in batch.problems],
        total=len(rows),
        source=rows.source,
        policy=formatter.on_bad_rows,
        limit=formatter.max_reported_rows,
    )
    too_long = [pair for batch in batches for pair in batch.too_long]
    if report.truncation == "error":
        problems = [
            RowProblem(
                rows.get_location(index), f"{length:,} tokens, the limit is {report.max_length:,}"
            )
            for index, length in too_long
        ]
        settle_problems(
            problems,
            total=len(rows),
            source=rows.source,
            policy="raise",
            limit=formatter.max_reported_rows,
            advice="Raise max_length, or choose truncation='end' or truncation='drop'.",
        )
    if report.examples:
        return
    if report.dropped:
        why = (
            f"{report.dropped:,} are longer than max_length={report.max_length} tokens (the "
            f"longest has {report.longest:,}) and truncation='drop' leaves them out"
        )
    else:
        why = (
            f"the prompts alone fill max_length={report.max_length} tokens (the longest row has "
            f"{report.longest:,}), so that the answers, which carry the loss, are cut off"
        )
    raise DataError(
        f"None of the {report.rows:,} rows of {rows.source} leaves a token to learn: {why}. "
        "Raise max_length (max_seq_length of the model)."
    )


def _log(report: EncodingReport) -> None:
    logger.log(logging.WARNING if report.has_losses else logging.INFO, "%s.", report)
