"""Packing: several examples in one row of fixed length, chosen so that little is wasted.

Examples are never cut. Rows say where each example ends, and attention and positions keep
them apart (see :class:`~qlora_kit.data.PackedCollator`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qlora_kit.data.tokens.truncation import flatten_lists
from qlora_kit.errors import ConfigError, DataError, invalid_value
from qlora_kit.messages import Setting
from qlora_kit.values import IGNORED_LABEL, is_whole_number

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["pack_examples", "plan_packs"]

logger = logging.getLogger(__name__)

_STRATEGIES: Final = ("bfd", "sequential")


def pack_examples(encoded_dataset: Dataset, max_length: int, *, strategy: str = "bfd") -> Dataset:
    """Put whole examples together into rows of at most ``max_length`` tokens.

    Args:
        encoded_dataset: Rows with ``input_ids`` and ``labels``, none longer than ``max_length``.
        max_length: Length of a row, in tokens.
        strategy: ``"bfd"`` (best fit, longest first: the fullest rows) or ``"sequential"``
            (examples in their order, a new row when the next does not fit).

    Returns:
        Rows with ``input_ids``, ``labels`` and ``seq_lengths``, the examples' lengths in order.

    Raises:
        ConfigError: When the strategy is unknown.
        DataError: When an example is longer than ``max_length``, or there are none.
    """
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    names = getattr(encoded_dataset, "column_names", ())
    if "input_ids" not in names or "labels" not in names:
        raise DataError(
            "pack_examples takes an encoded dataset with input_ids and labels, such as "
            f"formatter.encode(...).dataset; got {type(encoded_dataset).__name__} with columns "
            f"{list(names)}."
        )
    if "seq_lengths" in names:
        raise DataError(
            "These rows are packed already (they have seq_lengths); packing them again would join "
            "their examples. Pack the dataset that formatter.encode(...) made."
        )
    table = encoded_dataset.with_format("arrow")[:]
    columns = {name: flatten_lists(table[name]) for name in ("input_ids", "labels")}
    ids, offsets = columns["input_ids"]
    labels, label_offsets = columns["labels"]
    if not np.array_equal(offsets, label_offsets):
        raise DataError("input_ids and labels are not of the same length in every row.")
    labels = labels.copy()
    lengths = np.diff(offsets)
    labels[offsets[:-1][lengths > 0]] = IGNORED_LABEL
    packs = plan_packs(lengths.tolist(), max_length, strategy=strategy)
    order = np.array([index for pack in packs for index in pack], dtype=np.int64)
    # Where each token of the packed table stands in the unpacked one.
    sizes = lengths[order]
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1]) + np.repeat(offsets[order] - (ends - sizes), sizes)
    counts = np.array([len(pack) for pack in packs])
    example_ends = np.cumsum(counts)
    row_offsets = pa.array(np.concatenate([[0], ends[example_ends - 1]]), pa.int64())
    example_offsets = pa.array(np.concatenate([[0], example_ends]), pa.int64())
    packed = Dataset(
        pa.table(
            {
                "input_ids": pa.LargeListArray.from_arrays(row_offsets, pa.array(ids[places])),
                "labels": pa.LargeListArray.from_arrays(row_offsets, pa.array(labels[places])),
                "seq_lengths": pa.LargeListArray.from_arrays(
                    example_offsets, pa.array(sizes, pa.int32())
                ),
            }
        )
    )
    logger.info(
        "Packed %s examples into %s rows of %s tokens, %.1f%% full.",
        f"{len(order):,}",
        f"{len(packs):,}",
        f"{max_length:,}",
        100 * float(ends[-1]) / (len(packs) * max_length),
    )
    return packed


def plan_packs(
    lengths: Sequence[int], max_length: int, *, strategy: str = "bfd"
) -> list[list[int]]:
    """Which examples go together, as lists of their indices; each index once.

    Best-fit decreasing puts each example, longest first, into the fullest row that still has
    room (Johnson 1973). Rows come out in the order of their first example, so that row order
    says nothing about length.

    Args:
        lengths: Length of each example, in tokens.
        max_length: Length of a row, in tokens.
        strategy: ``"bfd"`` or ``"sequential"``.
    """
    if strategy not in _STRATEGIES:
        raise ConfigError(
            f"packing_strategy must be {' or '.join(map(repr, _STRATEGIES))}, got {strategy!r}."
        )
    if not is_whole_number(max_length, at_least=1):
        raise invalid_value("max_length", "must be at least 1 token", max_length)
    if not lengths:
        raise DataError("There are no examples to pack.")
    longest = max(lengths)
    if longest > max_length:
        raise DataError(
            f"Example {list(lengths).index(longest)} has {longest:,} tokens and does not fit "
            f"into rows of {max_length:,}.",
            advice=("Encode with ", Setting("max_length", max_length, "train_sft"), " first."),
        )
    packs = _best_fit(lengths, max_length) if strategy == "bfd" else _in_order(lengths, max_length)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def _best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(max_length + 1)]  # by room left
    # Bit n says that some pack has n tokens of room: the best fit is then one lowest-bit
    # search in a big integer instead of a walk over all rooms.
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(index)
        left = room - length
        open_packs[left].append(pack)
        rooms |= 1 << left
    return packs


def _in_order(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = max_length
        packs[-1].append(index)
        room -= length
    return packs
