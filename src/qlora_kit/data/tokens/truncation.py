"""Examples cut, left out or refused where they are too long, and what became of them counted.

Works on whole columns at once: token ids and labels end to end, and where each example begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qlora_kit.data.tokens.encoding_report import EncodingReport
from qlora_kit.errors import invalid_value
from qlora_kit.messages import Setting
from qlora_kit.values import IGNORED_LABEL, is_whole_number

if TYPE_CHECKING:
    import pyarrow as pa

#: For rows that may not be longer than they are.
SHORTEN_ADVICE: Final = (
    "Raise max_length, or choose ",
    Setting("truncation", "end"),
    " or ",
    Setting("truncation", "drop"),
    ".",
)

__all__ = ["SHORTEN_ADVICE", "FittedExamples", "check_limits", "fit_examples", "flatten_lists"]

_TRUNCATIONS: Final = ("end", "drop", "error")


class FittedExamples(NamedTuple):
    """Examples of at most ``max_length`` tokens.

    Attributes:
        table: ``input_ids`` and ``labels``, lists of int32.
        report: What became of the examples.
        too_long: Place and length of each that was longer, in tokens.
    """

    table: pa.Table
    report: EncodingReport
    too_long: list[tuple[int, int]]


def check_limits(max_length: Any, truncation: Any) -> None:
    """Refuse limits that cannot work; the one check of both, whoever was given them.

    Raises:
        ConfigError: When the length is not at least 2, or the policy is unknown.
    """
    if not is_whole_number(max_length, at_least=2):
        raise invalid_value("max_length", "must be at least 2 tokens", max_length)
    if truncation not in _TRUNCATIONS:
        raise invalid_value("truncation", "must be 'end', 'drop' or 'error'", truncation)


def fit_examples(
    input_ids: Any, labels: Any, offsets: Any, *, max_length: int, truncation: str
) -> FittedExamples:
    """Fit examples into ``max_length`` tokens, and leave out those with nothing to learn.

    Args:
        input_ids: Token ids of all examples end to end, int32, shape ``(T,)``.
        labels: Their labels, -100 where there is no loss, int32, shape ``(T,)``.
        offsets: Where each example begins, and the end of the last, int64, shape ``(N + 1,)``.
        max_length: Most tokens of an example.
        truncation: ``"end"`` cuts longer ones there; ``"drop"`` and ``"error"`` leave them out.
    """
    import numpy as np
    import pyarrow as pa

    starts, lengths = offsets[:-1], np.diff(offsets)
    labels = labels.copy()
    # Nothing comes before the first token that it could be predicted from.
    labels[starts[lengths > 0]] = IGNORED_LABEL
    is_long = lengths > max_length
    is_dropped = is_long & (truncation != "end")
    sizes = np.minimum(lengths, max_length)
    trained_before = np.concatenate([[0], np.cumsum(labels != IGNORED_LABEL)])
    trained = trained_before[starts + sizes] - trained_before[starts]
    is_kept = ~is_dropped & (trained > 0)
    is_cut = is_kept & is_long
    kept = sizes[is_kept]
    ends = np.cumsum(kept)
    total = int(kept.sum())
    # Where each kept token stands among all of them.
    places = np.arange(total) + np.repeat(starts[is_kept] - (ends - kept), kept)
    new_offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    table = pa.table(
        {
            name: pa.ListArray.from_arrays(new_offsets, pa.array(values[places], pa.int32()))
            for name, values in (("input_ids", input_ids), ("labels", labels))
        }
    )
    report = EncodingReport(
        rows=len(lengths),
        examples=len(kept),
        truncated=int(is_cut.sum()),
        dropped=int(is_dropped.sum()),
        without_trained_tokens=int((~is_dropped & (trained == 0)).sum()),
        tokens=total,
        trained_tokens=int(trained[is_kept].sum()),
        lost_tokens=int(lengths.sum()) - total,
        longest=int(lengths.max(initial=0)),
        max_length=max_length,
        truncation=truncation,
    )
    too_long = [(int(place), int(lengths[place])) for place in np.flatnonzero(is_long)]
    return FittedExamples(table, report, too_long)


def flatten_lists(column: Any) -> tuple[Any, Any]:
    """A column of lists as one int32 array of values, and the offsets of each list in it."""
    import numpy as np
    import pyarrow as pa

    lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    lists = lists.cast(pa.large_list(pa.int32()))
    offsets = np.asarray(lists.offsets, dtype=np.int64)
    values = np.asarray(lists.values)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]
