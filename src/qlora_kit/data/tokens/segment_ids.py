"""Rows to segments to token ids: each segment tokenized by itself, joined as ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora_kit.data.sources.row_problems import BadRows, RowProblem
from qlora_kit.data.sources.rows import Rows
from qlora_kit.data.tokens.segments import Segment
from qlora_kit.data.tokens.text_tokenizer import TextTokenizer
from qlora_kit.errors import DataError

__all__ = ["RowEncoding", "SegmentedRows", "digest_segments", "join_segments", "make_segments"]


@dataclass(frozen=True)
class RowEncoding:
    """How rows become token ids: what encoding and inspection need to know of a formatter.

    Attributes:
        segments: The segments of a row, in order, the end token left out.
        text: The tokenizer.
        end_id: The end token's id, appended to every example; ``None`` where segments have it.
        adds_bos: Whether the tokenizer's beginning token comes first.
        trains_all: Whether prompts carry loss too.
        reads_specials: Whether the names of special tokens in rows are the tokens.
        bad_rows: What happens to rows of which nothing can be made.
        fingerprint: Digest of everything that decides which ids a row becomes.
        is_described: Whether the fingerprint says all about ``segments``; code from elsewhere may
            do whatever it likes.
    """

    segments: Callable[[Mapping[str, Any]], Sequence[Segment]]
    text: TextTokenizer
    end_id: int | None
    adds_bos: bool
    trains_all: bool
    reads_specials: bool
    bad_rows: BadRows
    fingerprint: Callable[[], str]
    is_described: bool

    def read_specials(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """The segments with special tokens in their text cut out, where they are to be read."""
        if not self.reads_specials:
            return segments
        read = [
            piece._replace(is_excluded=segment.is_excluded)
            for segment in segments
            for piece in (
                [segment]
                if segment.is_special
                else self.text.split_special(segment.text, is_trained=segment.is_trained)
            )
        ]
        # An answer that brings its end token along gets no second one.
        last = read[-1] if read and self.end_id is not None else None
        if last and last.is_special and self.text.get_token_id(last.text) == self.end_id:
            read.pop()
        return read


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


def make_segments(encoding: RowEncoding, rows: Rows, indices: range) -> SegmentedRows:
    """The segments of the rows at ``indices``."""
    result = SegmentedRows([], [], [])
    for index in indices:
        try:
            result.segments.append(encoding.read_specials(encoding.segments(rows[index])))
        except DataError as error:
            result.problems.append(RowProblem(rows.get_location(index), str(error)))
        else:
            result.places.append(index)
    return result


def digest_segments(encoding: RowEncoding, rows: Rows) -> str:
    """A digest of what a formatter makes of rows, whatever code it runs to do so."""
    digest = hashlib.sha256()
    for segments in make_segments(encoding, rows, range(len(rows))).segments:
        digest.update(repr([tuple(segment) for segment in segments]).encode())
    return digest.hexdigest()[:16]


def join_segments(
    encoding: RowEncoding, examples: Sequence[Sequence[Segment]], *, is_open: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Tokenize each segment by itself and join the ids.

    Args:
        encoding: Says which tokens begin and end an example, and what carries loss.
        examples: The segments of each example.
        is_open: Leave the end token out: the example is a prompt.

    Returns:
        The ids of each example, and for each id whether it carries loss.
    """
    text = encoding.text
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
    prefix = text.prefix_ids if encoding.adds_bos else []
    trains_all = encoding.trains_all
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
            is_trained = segment.is_trained or (trains_all and not segment.is_excluded)
            trained += [is_trained] * len(piece)
        if encoding.end_id is not None and not is_open:
            ids.append(encoding.end_id)
            trained.append(True)
        if trained:
            trained[0] = False
        joined.append((ids, trained))
    return joined
