"""Training input that is tokens or rendered text already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.data import AlpacaFormatter, TextFormatter, formatter_from_spec, pack_examples
from qlora_kit.data.tokens.pretokenized import take_tokenized
from qlora_kit.errors import ConfigError, DataError

from .conftest import SPECIALS

IDS = [5, 6, 7, 8]


def _take(*rows: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    encoded = take_tokenized(list(rows), **{"max_length": 16, **options})
    return encoded.dataset.to_list(), encoded.report


def test_labels_default_to_the_ids_and_never_fall_on_the_first_token() -> None:
    assert _take({"input_ids": IDS})[0] == [{"input_ids": IDS, "labels": [-100, 6, 7, 8]}]
    own = {"input_ids": IDS, "labels": [5, -100, 7, 9]}
    assert _take(own)[0] == [{"input_ids": IDS, "labels": [-100, -100, 7, 9]}]


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_trls_loss_masks_decide_where_there_are_no_labels(name: str) -> None:
    (row,), report = _take({"input_ids": IDS, name: [0, 0, 1, 1]})
    assert row == {"input_ids": IDS, "labels": [-100, -100, 7, 8]}
    assert report.trained_tokens == 2


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
def test_padding_is_neither_seen_nor_learned(mask: list[int]) -> None:
    ids = [5, 6, 7, 2, 2] if mask[0] else [2, 2, 5, 6, 7]
    (row,), report = _take({"input_ids": ids, "attention_mask": mask})
    assert row == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert report.tokens == 3


def test_rows_with_nothing_to_learn_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    silent = {"input_ids": IDS, "labels": [5, -100, -100, -100]}
    rows, report = _take(silent, {"input_ids": [5], "labels": [5]}, {**silent, "labels": IDS})
    assert [row["labels"] for row in rows] == [[-100, 6, 7, 8]]
    assert (report.rows, report.without_trained_tokens) == (3, 2)
    assert "2 rows (66.7%) left out because nothing to learn" in caplog.text
    with pytest.raises(DataError, match=r"None of the 1 rows .* every label .* is -100"):
        _take(silent)


def test_truncation_is_the_formatters() -> None:
    long = {"input_ids": list(range(20)), "labels": [-100] * 18 + [18, 19]}
    short = {"input_ids": IDS, "labels": IDS}
    rows, report = _take(long, {**long, "labels": list(range(20))}, short)
    assert [len(row["input_ids"]) for row in rows] == [16, 4]
    assert (report.truncated, report.without_trained_tokens, report.lost_tokens) == (1, 1, 24)
    rows, report = _take(long, short, truncation="drop")
    assert (len(rows), report.dropped) == (1, 1)
    with pytest.raises(DataError, match=r"row 1 \(index 0\): 20 tokens, the limit is 16"):
        _take(long, short, truncation="error")
    with pytest.raises(ConfigError, match="'end', 'drop' or 'error'"):
        _take(short, truncation="middle")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": IDS, "labels": IDS[:3]}, r"row 1 \(index 0\): 3 labels for 4 input_ids"),
        ({"input_ids": IDS, "attention_mask": [1]}, "1 attention_mask for 4 input_ids"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [5, -3]}, "token id -3, where the model has 0 to 399"),
        ({"input_ids": [5, 400]}, "token id 400, where the model has 0 to 399"),
        ({"input_ids": [5, 6], "labels": [-100, -1]}, "label -1, where"),
        ({"labels": IDS}, "Row 1 is not a dictionary with input_ids"),
        (5, "Row 1 is not a dictionary with input_ids: 5"),  # type: ignore[list-item]
        ({"input_ids": "text"}, "must hold lists of whole numbers"),
        ({"input_ids": 5}, "must hold lists of whole numbers"),
        ({"input_ids": [1.5, 2.0]}, "must hold lists of whole numbers"),
        ({"input_ids": [1, None]}, "has nulls"),
        ({"input_ids": None}, "has nulls|must hold lists"),
        ({"input_ids": IDS, "seq_lengths": [1, 2]}, "add up to 3"),
        ({"input_ids": IDS, "seq_lengths": [4, 0]}, r"row 1 \(index 0\): .* one is 0"),
        ({"input_ids": IDS, "seq_lengths": [5, -1]}, r"row 1 \(index 0\): .* one is -1"),
    ],
)
def test_what_is_no_token_ids_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _take(row, vocabulary_size=400)


def test_all_bad_rows_are_named_at_once() -> None:
    rows = [{"input_ids": [1, n]} for n in (3, 500, 4, -1)]
    with pytest.raises(DataError) as caught:
        _take(*rows, vocabulary_size=400)
    assert "2 of 4 rows" in str(caught.value)
    assert "row 2 (index 1): token id 500" in str(caught.value)
    assert "row 4 (index 3): token id -1" in str(caught.value)


def test_packed_rows_stay_packed(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, "{instruction}{input}|{output}", response_only=True)
    rows = [{"instruction": "Say", "output": "hello " * n} for n in range(1, 9)]
    packed = pack_examples(formatter.encode(rows, max_length=64).dataset, 64)
    encoded = take_tokenized(packed, max_length=64)
    assert encoded.dataset.to_list() == packed.to_list()
    silent = {"input_ids": IDS, "labels": [5, -100, 7, -100], "seq_lengths": [2, 2]}
    rows_, report = _take(silent, {**silent, "labels": IDS})
    assert rows_ == [{**silent, "labels": [-100, 6, -100, 8]}]
    assert report.without_trained_tokens == 1
    with pytest.raises(DataError, match="None of the 1 rows"):
        _take(silent)
    with pytest.raises(DataError, match="packed already"):
        pack_examples(packed, 64)


pieces = st.lists(
    st.one_of(st.text(min_size=1, max_size=8), st.sampled_from([*SPECIALS, "Hello", " ", "\n"])),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=pieces.filter(lambda text: bool(text.strip())), end=st.sampled_from(["", "E", "E\n"]))
def test_a_rendered_text_has_its_special_tokens_and_ends_once(
    tokenizer: Any, text: str, end: str
) -> None:
    eos = tokenizer.eos_token
    text += end.replace("E", eos)
    encoded = TextFormatter(tokenizer).encode([{"text": text + " tail"}], max_length=4096)
    (row,) = encoded.dataset
    assert row["input_ids"] == [*tokenizer(text + " tail")["input_ids"], tokenizer.eos_token_id]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    stripped = text.rstrip()
    while stripped.endswith(eos):
        stripped = stripped.removesuffix(eos)
    if text.rstrip() != stripped and stripped:
        (row,) = TextFormatter(tokenizer).encode([{"text": text}], max_length=4096).dataset
        assert row["input_ids"] == [*tokenizer(stripped)["input_ids"], tokenizer.eos_token_id]


def test_a_rendered_chat_ends_once(tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    formatter = TextFormatter(tokenizer)
    (row,) = formatter.encode([{"text": text}], max_length=64).dataset
    assert row["input_ids"] == tokenizer(text.rstrip())["input_ids"]
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2
    again = formatter_from_spec(formatter.template_spec(), tokenizer)
    assert again.fingerprint == formatter.fingerprint


def test_a_beginning_token_in_the_text_is_not_doubled(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bos"]
    for text in ("Hello", "<|bos|>Hello"):
        (row,) = TextFormatter(tokenizer).encode([{"text": text}], max_length=64).dataset
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_bad_texts_are_reported_with_their_lines(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n{"text": ""}\n{"text": 5}\n')
    with pytest.raises(DataError) as caught:
        TextFormatter(tokenizer).load(path)
    assert "line 2 (row 2): 'text' is empty" in str(caught.value)
    assert "line 3 (row 3): 'text' is not text but a number (5)" in str(caught.value)
