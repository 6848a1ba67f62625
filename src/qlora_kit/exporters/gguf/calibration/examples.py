"""The texts that a model is watched on, as token ids: the training rows, rows given, or a text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting

__all__ = ["CalibrationExamples", "choose_examples"]

#: Tokens that are looked at; llama.cpp's users take about a hundred chunks of 512.
_MOST_TOKENS: Final = 1 << 16


@dataclass(frozen=True)
class CalibrationExamples:
    """Token ids to run a model on.

    Attributes:
        token_ids: One list an example.
        origin: Where they are from, in words.
        total: How many examples there were to choose from.
    """

    token_ids: list[list[int]]
    origin: str
    total: int

    @property
    def tokens(self) -> int:
        """How many tokens they are."""
        return sum(map(len, self.token_ids))


def choose_examples(
    model: LoadedModel, given: Any, *, option: str, most_tokens: int = _MOST_TOKENS
) -> CalibrationExamples:
    """Examples of what was asked for, evenly spread over it where there are many.

    Args:
        model: The live model.
        given: ``True`` for the rows it was trained on in this process; otherwise texts, a text
            file, token ids, or rows of any kind that ``train_sft`` takes, put into the template
            that the model was trained with.
        option: The option's name, for messages.
        most_tokens: How many tokens are enough.

    Raises:
        ConfigError: When there is nothing to look at.
        DataError: When rows cannot be read.
    """
    if given is True:
        examples, origin = _read_training_rows(model, option), "the training rows"
    elif isinstance(given, Sequence) and not len(given):
        examples, origin = [], "nothing"
    else:
        examples, origin = _read_given(model, given, option)
    longest = model.max_seq_length
    cut = [ids[at : at + longest] for ids in examples for at in range(0, len(ids), longest)]
    cut = [ids for ids in cut if len(ids) > 1]
    if not cut:
        raise ConfigError(
            Setting(option, given if given is True else ..., "export_model"),
            " has no text to look at: give rows with some.",
        )
    return CalibrationExamples(_spread(cut, most_tokens), origin, len(examples))


def _spread(examples: list[list[int]], most_tokens: int) -> list[list[int]]:
    total = sum(map(len, examples))
    if total <= most_tokens:
        return examples
    wanted = max(1, int(len(examples) * most_tokens / total))
    return [examples[index * len(examples) // wanted] for index in range(wanted)]


def _read_training_rows(model: LoadedModel, option: str) -> list[list[int]]:
    dataset = model.record.examples
    if dataset is None:
        raise ConfigError(
            Setting(option, True, "export_model"),
            " looks at the rows that the model was trained on, and it was not trained in this "
            "process. Give rows, a text file or an importance matrix instead.",
        )
    return _list_ids(dataset)


def _list_ids(dataset: Any) -> list[list[int]]:
    """Token ids of a dataset, packed rows taken apart."""
    if "seq_lengths" not in dataset.column_names:
        return [list(ids) for ids in dataset["input_ids"]]
    found = []
    for ids, lengths in zip(dataset["input_ids"], dataset["seq_lengths"], strict=True):
        start = 0
        for length in lengths:
            found.append(list(ids[start : start + length]))
            start += length
    return found


def _read_given(model: LoadedModel, given: Any, option: str) -> tuple[list[list[int]], str]:
    if isinstance(given, str | os.PathLike):
        path = Path(given).expanduser()
        if path.suffix.lower() in (".txt", ".raw", ".md"):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{option}: {path} cannot be read: {error}") from error
            return _encode_texts(model, [text]), path.name
        return _encode_rows(model, os.fspath(given), option), path.name
    if isinstance(given, Sequence) and given and all(isinstance(row, str) for row in given):
        return _encode_texts(model, given), f"{len(given)} texts"
    if isinstance(given, Sequence) and given and all(_is_ids(row) for row in given):
        return [list(row) for row in given], f"{len(given)} lists of token ids"
    return _encode_rows(model, given, option), "rows that were given"


def _is_ids(row: Any) -> bool:
    return (
        isinstance(row, Sequence) and not isinstance(row, str) and all(type(i) is int for i in row)
    )


def _encode_texts(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    # A long text is cut into windows later; the tokenizer's own limit is not asked.
    return [list(model.tokenizer(text, verbose=False)["input_ids"]) for text in texts]


def _encode_rows(model: LoadedModel, rows: Any, option: str) -> list[list[int]]:
    from qlora_kit.training.arguments import DataOptions
    from qlora_kit.training.examples import prepare_examples

    options = DataOptions(max_length=model.max_seq_length)
    try:
        data = prepare_examples(model, rows, model.record.formatter, options)  # type: ignore[arg-type]
    except QloraKitError as error:
        raise error.after(f"{option}: ") from error
    return _list_ids(data.dataset)
