"""Rows to segments to token ids: each segment tokenized by itself, joined as ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qlora_kit.data.sources.row_problems import RowProblem
from qlora_kit.data.tokens.segments import Segment
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from qlora_kit.data.formatters.formatter_base import FormatterBase
    from qlora_kit.data.sources.rows import Rows

__all__ = ["SegmentedRows", "digest_segments", "join_segments", "make_segments"]


class SegmentedRows(NamedTuple):
    """Some rows as segments.

    Attributes:
        places: Which rows, by their index.
        segments: The segments of each of them.
        problems: The rows that the formatter could make nothing of.
    """

    places: list[int]
    segments: list[Sequence[Segment]]
    problems: list[RowProblem]


def make_segments(formatter: FormatterBase, rows: Rows, indices: range) -> SegmentedRows:
    """The segments of the rows at ``indices``."""
    result = SegmentedRows([], [], [])
    for index in indices:
        try:
            result.segments.append(formatter.segments(rows[index]))
        except DataError as error:
            result.problems.append(RowProblem(rows.get_location(index), str(error)))
        else:
            result.places.append(index)
    return result


def digest_segments(formatter: FormatterBase, rows: Rows) -> str:
    """A digest of what a formatter makes of rows, whatever code it runs to do so."""
    digest = hashlib.sha256()
    for segments in make_segments(formatter, rows, range(len(rows))).segments:
        digest.update(repr([tuple(segment) for segment in segments]).encode())
    return digest.hexdigest()[:16]


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
