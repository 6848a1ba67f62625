"""Rows to token ids and labels: the one place where it is decided what carries loss."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qlora_kit.boundaries import describe_cause
from qlora_kit.data.sources.row_problems import BadRows, RowProblem, settle_problems
from qlora_kit.data.sources.rows import Rows
from qlora_kit.data.tokens.encoded_cache import find_cached, holding_cache, make_key, store
from qlora_kit.data.tokens.encoding_report import EncodingReport, explain_emptiness
from qlora_kit.data.tokens.segment_ids import (
    RowEncoding,
    digest_segments,
    join_segments,
    make_segments,
)
from qlora_kit.data.tokens.segments import Segment
from qlora_kit.data.tokens.truncation import SHORTEN_ADVICE, check_limits, fit_examples
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.progress import open_progress
from qlora_kit.values import IGNORED_LABEL

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["EncodedExamples", "encode_rows"]

logger = logging.getLogger(__name__)

_BATCH: Final = 1000
_CACHED_FROM: Final = 2000


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


_Work = tuple[RowEncoding, Rows, int, str]


class _Batch(NamedTuple):
    table: Any
    report: EncodingReport
    too_long: list[tuple[int, int]]
    problems: list[RowProblem]


def encode_rows(
    encoding: RowEncoding,
    rows: Rows,
    *,
    max_length: int,
    truncation: str = "end",
    num_proc: int | None = None,
    cache: bool | None = None,
) -> EncodedExamples:
    """Turn rows into token ids and labels; see :meth:`FormatterBase.encode`."""
    check_limits(max_length, truncation)
    if num_proc is not None and (not isinstance(num_proc, int) or num_proc < 1):
        raise ConfigError(f"num_proc must be at least 1, got {num_proc!r}.")
    if not len(rows):
        raise DataError(f"{rows.source} has no rows.")
    start = time.perf_counter()
    if cache if cache is not None else len(rows) >= _CACHED_FROM:
        content = rows.fingerprint if encoding.is_described else digest_segments(encoding, rows)
        # An error about bad rows must not be answered with what an earlier run left of them.
        policy = encoding.bad_rows.policy
        key = make_key(content, encoding.fingerprint(), policy, str(max_length), truncation)
        # Of several processes that want the same rows, one encodes and the others find them.
        with holding_cache(key):
            cached = find_cached(key)
            if cached is None:
                return _encode(encoding, rows, max_length, truncation, num_proc, key, start)
        dataset, values = cached
        report = EncodingReport(**values)
        report = replace(report, is_cached=True, seconds=time.perf_counter() - start)
        _log(report)
        return EncodedExamples(dataset, report)
    return _encode(encoding, rows, max_length, truncation, num_proc, None, start)


def _encode(
    encoding: RowEncoding, rows: Rows, max_length: int, truncation: str, num_proc: int | None,
    key: str | None, start: float,
) -> EncodedExamples:  # fmt: skip
    batches = list(_encode_all(encoding, rows, max_length, truncation, num_proc))
    report = EncodingReport.add_up([batch.report for batch in batches])
    report = replace(report, seconds=time.perf_counter() - start)
    _check_outcome(encoding.bad_rows, rows, batches, report)
    dataset = _make_dataset(batches)
    if key is not None:
        dataset = store(key, dataset, asdict(report))
    _log(report)
    return EncodedExamples(dataset, report)


def _encode_all(
    encoding: RowEncoding, rows: Rows, max_length: int, truncation: str, num_proc: int | None
) -> Iterator[_Batch]:
    work = (encoding, rows, max_length, truncation)
    starts = range(0, len(rows), _BATCH)
    processes = min(_choose_processes(encoding, len(rows), num_proc), len(starts))
    if processes > 1 and not _can_be_sent(encoding):
        processes = 1
    # What takes a moment only needs no progress bar.
    with open_progress(len(rows), "Tokenizing", "rows", hidden=len(starts) == 1) as progress:
        if processes == 1:
            for start in starts:
                yield (batch := _encode_batch(*work, start))
                progress.update(batch.report.rows)
            return
        for batch in _encode_in_processes(work, starts, processes):
            yield batch
            progress.update(batch.report.rows)


def _encode_in_processes(work: _Work, starts: range, processes: int) -> Iterator[_Batch]:
    """The batches in order, from processes of their own.

    loky starts them afresh, where a fork would copy threads' locks as they happen to be, and does
    not run the caller's script again in them, as the standard library's fresh processes do.
    """
    from loky import ProcessPoolExecutor
    from loky.backend import get_context
    from loky.process_executor import BrokenProcessPool

    pool = ProcessPoolExecutor(
        processes, context=get_context("loky"), initializer=_receive, initargs=(work,)
    )
    try:
        yield from pool.map(_encode_received, starts)
    except BrokenProcessPool as error:
        raise DataError(
            f"The processes that tokenize ended early: {describe_cause(error)}",
            advice="Give dataset_num_proc=1: what is wrong then shows, and little memory is used.",
        ) from error
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _can_be_sent(encoding: RowEncoding) -> bool:
    """Whether a formatter can go to another process; one that holds open files cannot."""
    from loky.backend.reduction import dumps

    try:
        dumps(encoding)
    except Exception as error:  # noqa: BLE001 -- whatever the objects of a formatter raise
        logger.warning(
            "Tokenizing in one process: the formatter cannot be sent to others (%s).",
            describe_cause(error),
        )
        return False
    return True


_received: list[_Work] = []


def _receive(work: _Work) -> None:
    _received[:] = [work]


def _encode_received(start: int) -> _Batch:
    return _encode_batch(*_received[0], start)


def _choose_processes(encoding: RowEncoding, rows: int, num_proc: int | None) -> int:
    if num_proc is not None:
        return num_proc
    if encoding.text.is_fast or rows < _CACHED_FROM:
        return 1
    return os.cpu_count() or 1


def _encode_batch(
    encoding: RowEncoding, rows: Rows, max_length: int, truncation: str, start: int
) -> _Batch:
    import numpy as np

    indices = range(start, min(start + _BATCH, len(rows)))
    places, segments, problems = make_segments(encoding, rows, indices)
    joined = join_segments(encoding, segments)
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in joined), np.int32)
    trained = np.fromiter(chain.from_iterable(trained for _, trained in joined), bool)
    fitted = fit_examples(
        ids,
        np.where(trained, ids, np.int32(IGNORED_LABEL)),
        np.cumsum([0, *(len(ids) for ids, _ in joined)]),
        max_length=max_length,
        truncation=truncation,
    )
    spelled, names = _find_spelled(encoding, segments)
    report = replace(
        fitted.report,
        rows=len(indices),
        unusable=len(problems),
        spelled_specials=spelled,
        special_names=names,
    )
    too_long = [(places[place], length) for place, length in fitted.too_long]
    return _Batch(fitted.table, report, too_long, problems)


def _find_spelled(
    encoding: RowEncoding, examples: Sequence[Sequence[Segment]]
) -> tuple[int, tuple[str, ...]]:
    """How many examples spell special tokens out as text, and which ones."""
    pattern, starts = encoding.text.special_pattern, encoding.text.special_starts
    count, names = 0, set[str]()
    if pattern is None:
        return 0, ()
    for segments in examples:
        # The letters first: most texts have none of them.
        found = {
            name
            for segment in segments
            if not segment.is_special and any(letter in segment.text for letter in starts)
            for name in pattern.findall(segment.text)
        }
        count += bool(found)
        names |= found
    return count, tuple(sorted(names))[:10]


def _make_dataset(batches: Sequence[_Batch]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    return Dataset(pa.concat_tables([batch.table for batch in batches]))


def _check_outcome(
    bad_rows: BadRows, rows: Rows, batches: Sequence[_Batch], report: EncodingReport
) -> None:
    settle_problems(
        [problem for batch in batches for problem in batch.problems],
        total=len(rows),
        source=rows.source,
        bad_rows=bad_rows,
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
            bad_rows=bad_rows._replace(policy="raise"),
            advice=SHORTEN_ADVICE,
        )
    if not report.examples:
        raise DataError(*explain_emptiness(report, rows.source))


def _log(report: EncodingReport) -> None:
    logger.log(logging.WARNING if report.has_losses else logging.INFO, "%s.", report)
    if report.spelled_specials:
        logger.warning(
            "%s of %s rows spell out %s, which stays text: no token is learned for it. "
            "special_tokens='tokens' makes such names the tokens.",
            f"{report.spelled_specials:,}",
            f"{report.rows:,}",
            ", ".join(map(repr, report.special_names)),
        )
