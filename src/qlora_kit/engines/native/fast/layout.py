"""Laying the rows of an effective batch end to end, in as few micro-batches as allowed.

Token ids and labels are still on the host here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_kit.values import IGNORED_LABEL

__all__ = [
    "Example", "MicroBatch", "RowBatch", "group_examples", "keep_rows", "lay_out", "split_rows",
]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One example: what it reads and what each of its tokens should predict next.

    Attributes:
        input_ids: Shape ``(L,)``.
        targets: The following token's id, or -100 for no loss, shape ``(L,)``.
    """

    input_ids: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int64]]


class RowBatch:
    """Rows as the data loader hands them over, left alone until a whole step is known.

    Not a list or mapping, so that nothing walks through its numbers one by one.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)


def keep_rows(rows: Sequence[Mapping[str, Any]]) -> RowBatch:
    """A collator that leaves the rows as they are."""
    return RowBatch(rows)


@dataclass(frozen=True)
class MicroBatch:
    """Examples laid end to end.

    Attributes:
        input_ids: Shape ``(T,)``.
        position_ids: Starting at 0 in each example, shape ``(T,)``.
        bounds: Cumulative lengths, int32, shape ``(examples + 1,)`` or longer with the last value
            repeated.
        longest: At least the longest example's length, int32 scalar; always in host memory.
        trained: Positions that carry loss, shape ``(P,)``; the last may be repeated.
        targets: What they should predict, -100 for repeats, shape ``(P,)``.
        tokens: Real tokens, fillers excluded.
        trained_tokens: Real positions that carry loss.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    longest: Tensor
    trained: Tensor
    targets: Tensor
    tokens: int
    trained_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; the copy does not wait for the device."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            source = tensor.pin_memory() if device.type == "cuda" else tensor
            return source.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            bounds=move(self.bounds),
            trained=move(self.trained),
            targets=move(self.targets),
        )


def split_rows(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The examples in rows, in order.

    Args:
        rows: ``input_ids`` and ``labels`` of equal length, with ``seq_lengths`` when a row holds
            several examples.
    """
    examples = []
    for row in rows:
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        labels = np.asarray(row["labels"], dtype=np.int64)
        lengths = row.get("seq_lengths")
        start = 0
        for length in lengths if lengths is not None else (len(ids),):
            if length == 0:
                continue
            targets = np.full(length, IGNORED_LABEL, dtype=np.int64)
            targets[:-1] = labels[start + 1 : start + length]
            examples.append(Example(ids[start : start + length], targets))
            start += length
    return examples


def group_examples(examples: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """Neighbours together, as evenly as order allows, none above ``most_tokens`` but alone."""
    total = sum(len(example.input_ids) for example in examples)
    count = -(-total // most_tokens)
    # Equal shares keep every micro-batch near the same size, hence the same kernels and graphs.
    share = min(most_tokens, -(-total // max(count, 1)))
    groups: list[list[Example]] = []
    size = 0
    for example in examples:
        length = len(example.input_ids)
        if groups and size + length <= most_tokens and size < share:
            groups[-1].append(example)
            size += length
        else:
            groups.append([example])
            size = length
    return groups


def lay_out(
    examples: Sequence[Example],
    most_tokens: int,
    *,
    round_tokens: Callable[[int], int] = lambda tokens: tokens,
    round_trained: Callable[[int, int], int] = lambda count, _: count,
    round_count: Callable[[int], int] = lambda count: count,
    round_longest: Callable[[int], int] = lambda longest: longest,
) -> list[MicroBatch]:
    """Micro-batches that together hold every example once, in order.

    Args:
        examples: The examples of one effective batch.
        most_tokens: Most tokens in a micro-batch; a longer example stands alone.
        round_tokens: Size to fill a micro-batch up to. Fillers attend among themselves only and
            carry no loss.
        round_trained: Size to fill ``trained`` up to, of its own and the filled number of tokens.
        round_count: Size to fill ``bounds`` up to.
        round_longest: What to declare as the longest length.
    """
    batches = []
    for group in group_examples(examples, most_tokens):
        lengths = [len(example.input_ids) for example in group]
        tokens = sum(lengths)
        filled = round_tokens(tokens)
        longest = round_longest(max(lengths))
        fillers = filled - tokens
        # Fillers form examples too: positions without one would hold whatever memory held.
        lengths += [longest] * (fillers // longest) + [fillers % longest] * (fillers % longest > 0)
        # Only these positions reach the language-model head: most of a prompt's never do.
        targets = np.concatenate([example.targets for example in group])
        trained = np.flatnonzero(targets != IGNORED_LABEL)
        bounds = np.cumsum([0, *lengths])
        room = round_trained(len(trained), filled)
        batches.append(
            MicroBatch(
                input_ids=_fill([example.input_ids for example in group], filled, 0),
                position_ids=_fill([np.arange(length) for length in lengths], filled, 0),
                bounds=_fill([bounds], round_count(len(bounds)), bounds[-1]).to(torch.int32),
                longest=torch.tensor(longest, dtype=torch.int32),
                trained=_fill([trained], room, int(trained[-1:].sum())),
                targets=_fill([targets[trained]], room, IGNORED_LABEL),
                tokens=tokens,
                trained_tokens=len(trained),
            )
        )
    return batches


def _fill(parts: Sequence[Any], size: int, value: int) -> Tensor:
    joined = np.concatenate(parts).astype(np.int64)
    filled = np.full(max(size, len(joined)), value, dtype=np.int64)
    filled[: len(joined)] = joined
    return torch.from_numpy(filled)
