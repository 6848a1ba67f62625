"""From what the user calls a dataset to token ids, labels and a collator.

Every kind of input ends in the same representation; only then is it packed or padded.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ConfigError, DataError
from qlora_kit.handles import AdaptedModel
from qlora_kit.messages import Call, Setting
from qlora_kit.training.arguments import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

    from qlora_kit.data import EncodedExamples, RawRows

__all__ = ["TrainingData", "make_collator", "prepare_examples", "prepare_training_data"]

logger = logging.getLogger(__name__)

#: Columns that say what a row is made of, beside which a ``text`` column is a copy.
_STRUCTURED = frozenset({"instruction", "messages", "conversations", "completion"})


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
    model: AdaptedModel,
    rows: Any,
    formatter: Any,
    options: DataOptions,
    seed: int,
    columns: Mapping[str, str] | None = None,
) -> TrainingData:
    """Encode, and pack or shuffle where asked.

    Raises:
        DataError: When rows are missing, malformed, or none of them has a token to train on.
    """
    data = prepare_examples(model, rows, formatter, options, columns)
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
    model: AdaptedModel,
    rows: Any,
    formatter: Any,
    options: DataOptions,
    named_columns: Mapping[str, str] | None = None,
) -> TrainingData:
    """Token ids and labels, one row an example.

    Where no formatter is given, the columns choose one, however the rows are given: a path, a
    dictionary of splits and a dataset in memory are read alike.
    """
    from qlora_kit.data import Formatter, RawRows, Rows, read_source
    from qlora_kit.data.tokens.pretokenized import take_tokenized

    if isinstance(rows, os.PathLike):
        rows = os.fspath(rows)
    # A streaming dataset has no length, and read_source says what to do about it.
    is_streaming = hasattr(rows, "features") and hasattr(rows, "column_names")
    if rows is None or not (hasattr(rows, "__len__") or is_streaming):
        raise DataError(
            f"train_sft needs rows: formatter.load(...), a datasets.Dataset or a list of "
            f"dictionaries; got {type(rows).__name__}."
        )
    if formatter is not None and not isinstance(formatter, Formatter):
        raise ConfigError(
            "formatter must be an AlpacaFormatter, a ChatFormatter or another Formatter; got "
            f"{type(formatter).__name__}."
        )
    if named_columns is not None and (formatter is not None or isinstance(rows, Rows)):
        raise ConfigError(
            "columns was given beside a formatter, which has columns of its own: "
            "AlpacaFormatter(tokenizer, columns=...)."
        )
    if isinstance(rows, Rows):
        formatter = formatter or rows.formatter
        if rows.unused:
            logger.warning("%s", rows.describe_unused())
    # Token ids in a dataset stay in its Arrow tables; anything else is read once, here.
    elif formatter is None and "input_ids" not in _columns(rows):
        rows = read_source(rows)
    columns = _columns(rows)
    if "input_ids" in columns:
        encoded = take_tokenized(
            [row.value for row in rows.rows] if isinstance(rows, RawRows) else rows,
            max_length=options.max_length,
            truncation=options.truncation,
            vocabulary_size=int(model.model.get_input_embeddings().weight.shape[0]),
        )
        return _describe("tokenized", encoded, formatter, getattr(rows, "origin", None))
    is_chosen = formatter is None
    if formatter is None:
        formatter = _choose_formatter(model, rows, columns, named_columns)
    # Before rows are read: an end token that the model lacks makes all of it useless.
    model.find_end_token_id(formatter)
    if not isinstance(rows, Rows):
        rows = formatter.load(rows)
    encoded = formatter.encode(
        rows,
        max_length=options.max_length,
        truncation=options.truncation,
        num_proc=options.dataset_num_proc,
    )
    _warn_beyond_positions(model, encoded.report, options.max_length)
    _check_vocabulary(model, encoded, formatter)
    # A rendered text says nothing about prompts, so nothing is remembered for generation.
    is_text = is_chosen and formatter.template_spec()["kind"] == "text"
    origin = getattr(rows, "origin", None)
    chosen = None if is_text else formatter
    data = _describe(getattr(rows, "source", None), encoded, chosen, origin)
    return dataclasses.replace(
        data,
        summary={
            **data.summary,
            "rows": len(rows),
            "columns": sorted(columns),
            "unused": [str(unused) for unused in getattr(rows, "unused", ())],
            "fingerprint": getattr(rows, "fingerprint", None),
            "template_fingerprint": getattr(formatter, "fingerprint", None),
        },
    )


def _check_vocabulary(model: AdaptedModel, encoded: EncodedExamples, formatter: Any) -> None:
    """Refuse tokens that the model has no embedding for, which would fail in the middle of a step.

    Raises:
        ConfigError: With the token and how to give the model room for it.
    """
    import pyarrow.compute as pc

    size = int(model.model.get_input_embeddings().weight.shape[0])
    table = encoded.dataset.data.table if len(encoded) else None
    ids = [] if table is None else [pc.max(pc.list_flatten(table["input_ids"])).as_py()]
    for index in (*ids, model.tokenizer.pad_token_id):
        if index is not None and index >= size:
            name = model.tokenizer.convert_ids_to_tokens(index)
            raise ConfigError(
                f"The token {name!r} has the id {index}, and the model has embeddings for {size} "
                "tokens only. Resize the checkpoint's embeddings with transformers first, or use "
                "a token that the model knows."
            )


def _choose_formatter(
    model: AdaptedModel, rows: RawRows, columns: set[str], named: Mapping[str, str] | None
) -> Any:
    """The formatter that the columns ask for, where none was given."""
    from qlora_kit.data import plan_formatter

    beside = sorted(columns & _STRUCTURED)
    if "text" in columns and beside:
        logger.warning(
            "The rows have a 'text' column beside %s; the template is applied to the latter and "
            "'text' is not used. To train on it: %s.",
            " and ".join(beside), Call("TextFormatter", "dataset.select_columns(['text'])"),
        )  # fmt: skip
    plan = plan_formatter(rows, columns=named)
    logger.info("No formatter was given; using %s(model.tokenizer).", plan.kind.__name__)
    formatter = plan.make(model.tokenizer)
    remembered = model.record.formatter
    if remembered is not None and _template_of(remembered) != _template_of(formatter):
        logger.warning(
            "The model was trained with the template %r, and these rows get %r, which their "
            "columns ask for. To keep it: %s.",
            _template_of(remembered).get("name"), _template_of(formatter)["name"],
            Setting("formatter", Call("record", "model.record.formatter")),
        )  # fmt: skip
    return formatter


def _template_of(formatter: Any) -> dict[str, Any]:
    """What a formatter puts around a row, whatever carries loss."""
    spec = formatter.template_spec()
    return {name: value for name, value in spec.items() if name != "response_only"}


def _describe(
    source: Any, encoded: EncodedExamples, formatter: Any, origin: Any = None
) -> TrainingData:
    summary = {
        "source": source,
        "origin": None if origin is None else origin.describe(),
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


def _columns(rows: Any) -> set[str]:
    """The columns of rows in memory, as far as they are seen without reading them."""
    from qlora_kit.data import RawRows

    names = rows.columns if isinstance(rows, RawRows) else getattr(rows, "column_names", None)
    if names is not None:
        # A dictionary of splits has a list for each.
        return set() if isinstance(names, Mapping) else set(names)
    first = rows[0] if isinstance(rows, Sequence) and len(rows) else {}
    return set(first) if isinstance(first, Mapping) else set()


def _warn_beyond_positions(model: AdaptedModel, report: Any, max_length: int) -> None:
    """Say so when examples are longer than the model was trained for."""
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(getattr(report, "longest", 0), max_length)
    if positions and longest > positions:
        logger.warning(
            "The longest example has %d tokens, beyond the %d positions this model was trained "
            "for; max_length=%d cuts them.", longest, positions, positions,
        )  # fmt: skip


def _as_mapping(report: Any) -> Any:
    return dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report  # type: ignore[arg-type]
