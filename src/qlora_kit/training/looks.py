"""What rows look like to the model, for a report: lengths, and two of them with what is learned."""

from __future__ import annotations

from typing import Any

from qlora_kit.values import IGNORED_LABEL

__all__ = ["describe_looks"]

_BINS = 24
_SHOWN = 2
_MOST_TOKENS = 400
_MOST_ROWS = 20_000


def describe_looks(dataset: Any, tokenizer: Any) -> dict[str, Any]:
    """A histogram of lengths, and rows as pieces of text that are learned or not.

    Args:
        dataset: The rows as the trainer got them.
        tokenizer: What writes their tokens.
    """
    names = getattr(dataset, "column_names", None) or ()
    if not {"input_ids", "labels"} <= set(names) or not len(dataset):
        return {}
    rows = dataset.with_format(None)
    sizes = [len(ids) for ids in rows.select(range(min(len(rows), _MOST_ROWS)))["input_ids"]]
    width = max(1, -(-max(sizes) // _BINS))
    counts = [0] * (max(sizes) // width + 1)
    for size in sizes:
        counts[size // width] += 1
    shown = [rows[index] for index in range(min(_SHOWN, len(rows)))]
    return {
        "lengths": {"width": width, "counts": counts},
        "rows": [_mark(row["input_ids"], row["labels"], tokenizer) for row in shown],
    }


def _mark(ids: list[int], labels: list[int], tokenizer: Any) -> list[dict[str, Any]]:
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids[:_MOST_TOKENS], labels[:_MOST_TOKENS], strict=True):
        is_trained = label != IGNORED_LABEL
        if not pieces or pieces[-1][0] != is_trained:
            pieces.append((is_trained, []))
        pieces[-1][1].append(token)
    return [
        {"text": tokenizer.decode(tokens), "is_trained": is_trained}
        for is_trained, tokens in pieces
    ]
