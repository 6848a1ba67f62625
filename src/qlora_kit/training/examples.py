"""From what the user calls a dataset to token ids, labels and a collator.

Every kind of input ends in the same representation; only then is it packed or padded.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ConfigError, DataError
from qlora_kit.results import AdaptedModel
from qlora_kit.training.arguments import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

    from qlora_kit.data import EncodedExamples

__all__ = ["TrainingData", "make_collator", "prepare_examples", "prepare_training_data"]

logger = logging.getLogger(__name__)

#: Columns that say what a row is made of, beside which a ``text`` column is a copy.
_STRUCTURED = frozenset({"instruction", "messages", "conversations"})


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

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several examples each."""
        return "seq_lengths" in self.dataset.column_names


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
    if options.packing and not data.is_packed:
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
    from qlora_kit.data import Formatter, Rows
    from qlora_kit.data.tokenized import take_tokenized

    if isinstance(rows, os.PathLike):
        rows = os.fspath(rows)
    if rows is None or not hasattr(rows, "__len__"):
        raise DataError(
            f"train_sft needs rows: formatter.load(...), a datasets.Dataset or a list of "
            f"dictionaries; got {type(rows).__name__}."
        )
    columns = _columns(rows)
    if "input_ids" in columns:
        encoded = take_tokenized(
            rows,
            max_length=options.max_length,
            truncation=options.truncation,
            vocabulary_size=model.model.get_input_embeddings().num_embeddings,
        )
        return _describe("tokenized", encoded, formatter)
    if isinstance(rows, Rows):
        formatter = formatter or rows.formatter
    if formatter is not None and not isinstance(formatter, Formatter):
        raise ConfigError(
            "formatter must be an AlpacaFormatter, a ChatFormatter or another Formatter; got "
            f"{type(formatter).__name__}."
        )
    is_text = formatter is None and "text" in columns and not columns & _STRUCTURED
    if formatter is None and "text" in columns and not is_text:
        logger.warning(
            "The rows have a 'text' column beside %s; the template is applied to the latter and "
            "'text' is not used. To train on it: dataset.select_columns(['text']).",
            " and ".join(sorted(columns & _STRUCTURED)),
        )
    if formatter is None:
        formatter = _choose_formatter(model, columns)
    if not isinstance(rows, Rows):
        rows = formatter.load(rows)
    encoded = formatter.encode(
        rows,
        max_length=options.max_length,
        truncation=options.truncation,
        num_proc=options.dataset_num_proc,
    )
    # A rendered text says nothing about prompts, so nothing is remembered for generation.
    data = _describe(getattr(rows, "source", None), encoded, None if is_text else formatter)
    return dataclasses.replace(
        data,
        summary={
            **data.summary,
            "rows": len(rows),
            "fingerprint": getattr(rows, "fingerprint", None),
            "template_fingerprint": getattr(formatter, "fingerprint", None),
        },
    )


def _choose_formatter(model: AdaptedModel, columns: set[str]) -> Any:
    """The formatter that a dataset's columns ask for, where none was given."""
    from qlora_kit.data import AlpacaFormatter, ChatFormatter, TextFormatter

    kind: Any = AlpacaFormatter
    if "instruction" not in columns:
        if columns & {"messages", "conversations"}:
            kind = ChatFormatter
        elif "text" in columns:
            kind = TextFormatter
    logger.info("No formatter was given; using %s(model.tokenizer).", kind.__name__)
    return kind(model.tokenizer)


def _describe(source: Any, encoded: EncodedExamples, formatter: Any) -> TrainingData:
    summary = {"source": source, "report": _as_mapping(encoded.report)}
    return TrainingData(encoded.dataset, formatter, summary)


def make_collator(model: AdaptedModel, options: DataOptions, *, is_flat: bool) -> Any:
    """A padded batch, or one flattened row whose examples cannot see each other."""
    from qlora_kit.data import PackedCollator, PaddedCollator

    pad = model.tokenizer.pad_token_id
    if is_flat:
        return PackedCollator(pad, pad_to_multiple_of=options.pad_to_multiple_of)
    return PaddedCollator(pad, pad_to_multiple_of=options.pad_to_multiple_of)


def _columns(rows: Any) -> set[str]:
    names = getattr(rows, "column_names", None)
    if names is not None:
        return set(names)
    first = rows[0] if len(rows) and not isinstance(rows, Mapping) else {}
    return set(first) if isinstance(first, Mapping) else set()


def _as_mapping(report: Any) -> Any:
    return dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report  # type: ignore[arg-type]
