"""How many tokens the rows of a pipeline have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.forecast.steps import RowTokens, find_attended
from qlora_kit.pipeline import CheckedPipeline

__all__ = ["count_tokens"]


def count_tokens(checked: CheckedPipeline, folder: Path, row_tokens: int | None) -> RowTokens:
    """The rows of a pipeline in tokens; they are formatted, cut and packed as training does.

    Args:
        checked: The pipeline with its rows.
        folder: Where the model's tokenizer lies.
        row_tokens: Tokens of a row where there is no data.
    """
    asked = checked.asked
    longest = int(asked.loading.get("max_seq_length") or 2048)
    limit = int(asked.training.get("max_length") or longest)
    if asked.data is None:
        size = min(row_tokens or limit, limit)
        return RowTokens((size,), size, 1_000_000)
    sizes, examples = _measure(checked, folder, limit)
    longest = max(examples, default=1)
    attended = find_attended(examples)
    return RowTokens(tuple(sorted(sizes, reverse=True)), longest, len(sizes), attended)


def _measure(checked: CheckedPipeline, folder: Path, limit: int) -> tuple[list[int], list[int]]:
    """Tokens of each row, and of each example in them."""
    from qlora_kit.data import pack_examples, plan_formatter, take_tokenized
    from qlora_kit.engines.tokenizer import load_tokenizer

    training = checked.asked.training
    truncation = str(training.get("truncation", "end"))
    if "input_ids" in checked.rows.columns:
        values = [row.value for row in checked.rows.rows]
        encoded: Any = take_tokenized(values, max_length=limit, truncation=truncation)
    else:
        tokenizer = load_tokenizer(folder)
        plan = checked.formatter or plan_formatter(checked.rows)
        formatter = plan.make(tokenizer)
        rows = formatter.load(checked.rows)
        if checked.asked.eval_fraction is not None:
            rows = rows.split(checked.asked.eval_fraction, checked.asked.data_seed)[0]
        encoded = formatter.encode(rows, max_length=limit, truncation=truncation)
    dataset = encoded.dataset
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if "seq_lengths" in dataset.column_names:
        return lengths, [size for parts in dataset["seq_lengths"] for size in parts]
    if training.get("packing"):
        packed = pack_examples(dataset, limit)
        return [len(ids) for ids in packed["input_ids"]], lengths
    return lengths, lengths
