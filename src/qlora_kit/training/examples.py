"""From what the user calls a dataset to token ids, labels and a collator.

Every kind of input ends in the same representation; only then is it packed or padded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ConfigError, DataError
from qlora_kit.results import AdaptedModel
from qlora_kit.training.arguments import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TrainingData", "make_collator", "prepare_examples", "prepare_training_data"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Examples ready for the trainer.

    Attributes:
        dataset: Rows with ``input_ids`` and ``labels``; ``seq_lengths`` when packed.
        formatter: The formatter that made them, or ``None`` for tokenized input.
        summary: JSON-able facts for the manifest.
    """

    dataset: Dataset
    formatter: Any
    summary: dict[str, Any]


def prepare_training_data(
    model: AdaptedModel, rows: Any, formatter: Any, options: DataOptions, seed: int
) -> TrainingData:
    """Encode, and pack or shuffle where asked.

    Raises:
        DataError: When rows are missing, malformed, or none of them has a token to train on.
    """
    data = prepare_examples(model, rows, formatter, options)
    dataset = data.dataset
    if options.shuffle_dataset:
        dataset = dataset.shuffle(seed=seed)
    summary = data.summary
    if options.packing:
        from qlora_kit.data import pack_examples

        unpacked = len(dataset)
        dataset = pack_examples(dataset, options.max_length, strategy=options.packing_strategy)
        logger.info("Packed %d examples into %d rows.", unpacked, len(dataset))
        summary = {**summary, "packed_rows": len(dataset)}
    return TrainingData(dataset, data.formatter, summary)


def prepare_examples(
    model: AdaptedModel, rows: Any, formatter: Any, options: DataOptions
) -> TrainingData:
    """Token ids and labels, one row an example."""
    from qlora_kit.data import AlpacaFormatter, FormatterBase, Rows

    if rows is None or not hasattr(rows, "__len__"):
        raise DataError(
            f"train_sft needs rows: formatter.load(...), a datasets.Dataset or a list of "
            f"dictionaries; got {type(rows).__name__}."
        )
    columns = _columns(rows)
    if "input_ids" in columns:
        dataset = _use_tokenized(model, rows, options)
        return TrainingData(dataset, formatter, {"source": "tokenized"})
    if "text" in columns and formatter is None and not columns & {"instruction", "messages"}:
        return TrainingData(_encode_text(model, rows, options), None, {"source": "text"})
    if isinstance(rows, Rows):
        formatter = formatter or rows.formatter
    if formatter is not None and not isinstance(formatter, FormatterBase):
        raise ConfigError(
            f"formatter must be an AlpacaFormatter, a ChatFormatter or another FormatterBase; "
            f"got {type(formatter).__name__}."
        )
    if formatter is None:
        formatter = AlpacaFormatter(model.tokenizer)
        logger.info("No formatter was given; using AlpacaFormatter(model.tokenizer).")
    if not isinstance(rows, Rows):
        rows = formatter.load(rows)
    encoded = formatter.encode(
        rows,
        max_length=options.max_length,
        truncation=options.truncation,
        num_proc=options.dataset_num_proc,
    )
    summary = {
        "source": getattr(rows, "source", None),
        "rows": len(rows),
        "fingerprint": getattr(rows, "fingerprint", None),
        "template_fingerprint": getattr(formatter, "fingerprint", None),
        "report": _as_mapping(encoded.report),
    }
    return TrainingData(encoded.dataset, formatter, summary)


def make_collator(model: AdaptedModel, options: DataOptions, *, is_flat: bool) -> Any:
    """A padded batch, or one flattened row whose examples cannot see each other."""
    from qlora_kit.data import PackedCollator, PaddedCollator

    pad = model.tokenizer.pad_token_id
    if is_flat:
        return PackedCollator(pad, pad_to_multiple_of=options.pad_to_multiple_of)
    return PaddedCollator(pad, pad_to_multiple_of=options.pad_to_multiple_of)


def _use_tokenized(model: AdaptedModel, rows: Any, options: DataOptions) -> Dataset:
    """The user's own token ids; labels default to the ids, as language modelling means."""
    from datasets import Dataset

    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    if not len(dataset):
        raise DataError("The dataset has no rows.")
    _check_token_ids(dataset, model.model.get_input_embeddings().num_embeddings)
    if "labels" not in dataset.column_names:
        dataset = dataset.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]}, desc="labels")
    return _fit(dataset.select_columns(["input_ids", "labels"]), options)


def _check_token_ids(dataset: Dataset, vocabulary: int) -> None:
    """Refuse rows that would fail in mid-training, or train on something else than was meant."""
    has_labels = "labels" in dataset.column_names
    wrong: list[str] = []
    for index, row in enumerate(dataset):
        ids, labels = row["input_ids"], row["labels"] if has_labels else ()
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            wrong.append(f"row {index}: input_ids are not whole numbers")
        elif not ids:
            wrong.append(f"row {index}: input_ids is empty")
        elif min(ids) < 0 or max(ids) >= vocabulary:
            bad = next(token for token in ids if not 0 <= token < vocabulary)
            wrong.append(f"row {index}: token id {bad}, where the model has 0 to {vocabulary - 1}")
        elif has_labels and len(labels) != len(ids):
            wrong.append(f"row {index}: {len(labels)} labels for {len(ids)} input_ids")
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise DataError(
            f"{len(wrong)} of {len(dataset)} tokenized rows cannot be used:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )


def _encode_text(model: AdaptedModel, rows: Any, options: DataOptions) -> Dataset:
    """A ``text`` column as notebooks make it; the end token is there once, whoever put it."""
    from datasets import Dataset

    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    tokenizer: Any = model.tokenizer
    eos = tokenizer.eos_token_id

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        bad = [text for text in batch["text"] if not isinstance(text, str) or not text]
        if bad:
            raise DataError(f"The column 'text' holds {bad[0]!r} where text is expected.")
        ids = [
            row if row and row[-1] == eos else [*row, eos]
            for row in tokenizer(batch["text"])["input_ids"]
        ]
        return {"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]}

    encoded = dataset.map(
        encode, batched=True, remove_columns=dataset.column_names, desc="tokenizing"
    )
    return _fit(encoded, options)


def _fit(dataset: Dataset, options: DataOptions) -> Dataset:
    """Apply ``truncation`` to rows beyond ``max_length``, and say how many there were."""
    limit = options.max_length
    long = [index for index, ids in enumerate(dataset["input_ids"]) if len(ids) > limit]
    if not long:
        return dataset
    said = (
        f"{len(long)} of {len(dataset)} rows ({len(long) / len(dataset):.1%}) are longer than "
        f"max_length={limit} tokens"
    )
    if options.truncation == "error":
        raise DataError(f"{said}; the first is row {long[0]}. Raise max_length or cut them.")
    if options.truncation == "drop":
        logger.warning("%s and are left out.", said)
        left_out = set(long)
        return dataset.select([i for i in range(len(dataset)) if i not in left_out])
    logger.warning("%s and lose their end.", said)
    return dataset.map(
        lambda row: {name: row[name][:limit] for name in ("input_ids", "labels")}, desc="cutting"
    )


def _columns(rows: Any) -> set[str]:
    names = getattr(rows, "column_names", None)
    if names is not None:
        return set(names)
    first = rows[0] if len(rows) and not isinstance(rows, Mapping) else {}
    return set(first) if isinstance(first, Mapping) else set()


def _as_mapping(report: Any) -> Any:
    return dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report  # type: ignore[arg-type]
