"""Every kind of source, and every way it can be broken."""

from __future__ import annotations

import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data import AlpacaFormatter, Rows, read_source
from qlora_kit.errors import ConfigError, DataError, DataNotFoundError, OfflineError

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello, world!"},
    {"instruction": "说你好。", "input": "“引号”, and\ntwo lines", "output": "你好，世界！"},
    {"instruction": "Count.", "input": "1", "output": "2"},
]


@pytest.fixture
def formatter(tokenizer: Any) -> AlpacaFormatter:
    return AlpacaFormatter(tokenizer)


def _write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(
    formatter: AlpacaFormatter, tmp_path: Path, suffix: str
) -> None:
    path = _write(tmp_path / f"rows{suffix}")
    for source in (path, str(path)):
        rows = formatter.load(source)
        assert list(rows) == ROWS
        assert rows.source == str(path)
    assert rows.fingerprint == formatter.load(ROWS).fingerprint


def test_lists_datasets_and_dictionaries_of_splits(formatter: AlpacaFormatter) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    assert list(formatter.load(dataset)) == ROWS
    assert list(formatter.load(ROWS)) == ROWS
    splits = DatasetDict({"train": dataset, "test": dataset.select([0])})
    assert len(formatter.load(splits)) == 3
    assert len(formatter.load(splits, split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'tset'.* Did you mean 'test'"):
        formatter.load(splits, split="tset")
    with pytest.raises(DataError, match=r"list\(dataset\.take"):
        formatter.load(dataset.to_iterable_dataset())
    with pytest.raises(DataError, match="Rows cannot be read from int"):
        formatter.load(5)


def test_a_folder_is_read_file_by_file(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    _write(tmp_path / "b.jsonl", ROWS[1:2])
    _write(tmp_path / "a.json", ROWS[:1])
    _write(tmp_path / "c.csv", ROWS[2:])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    _write(tmp_path / ".cache" / "d.json")
    assert list(formatter.load(tmp_path)) == ROWS
    _write(tmp_path / "c.csv", [{**ROWS[2], "output": ""}])
    with pytest.raises(DataError, match=r"c\.csv, line 2 \(row 1\): 'output' is empty"):
        formatter.load(tmp_path)


def test_a_folder_with_splits(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    _write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:2])
    _write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[2:])
    assert list(formatter.load(tmp_path)) == ROWS[:2]
    assert list(formatter.load(tmp_path, split="test")) == ROWS[2:]
    with pytest.raises(DataError, match="named after the split 'validation'"):
        formatter.load(tmp_path, split="validation")


def test_a_saved_dataset(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "many"))
    assert list(formatter.load(tmp_path / "one")) == ROWS
    assert list(formatter.load(tmp_path / "many")) == ROWS


def test_what_is_not_there(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    _write(tmp_path / "alpaca.json")
    with pytest.raises(DataNotFoundError, match=r"Did you mean '.*alpaca\.json'"):
        formatter.load(tmp_path / "alpacca.json")
    with pytest.raises(FileNotFoundError):
        formatter.load(tmp_path / "no" / "folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="It holds: nothing"):
        formatter.load(tmp_path / "empty")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"no known kind; known are \.json"):
        formatter.load(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match="empty name"):
        formatter.load(" ")


def test_a_hub_name_is_refused_without_touching_the_network(
    formatter: AlpacaFormatter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(OfflineError, match="local_files_only=False"):
        formatter.load("tatsu-lab/alpaca")


def test_a_hub_dataset_in_the_local_cache_is_used(
    formatter: AlpacaFormatter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--someone--rows"
    (repository / "refs").mkdir(parents=True)
    commit = "0" * 40
    (repository / "refs" / "main").write_text(commit)
    _write(repository / "snapshots" / commit / "data" / "train.jsonl")
    assert list(formatter.load("someone/rows")) == ROWS


def test_all_bad_rows_are_reported_at_once_with_their_lines(
    formatter: AlpacaFormatter, tmp_path: Path
) -> None:
    bad = [
        ROWS[0],
        {"instruction": None, "output": "x"},
        {"instruction": "a", "output": 5},
        {"instruction": "a"},
        {"instruction": " ", "output": ""},
        {"instruction": "a", "input": None, "output": "fine"},
        {"instruction": "a", "input": ["b"], "output": "\ud83d"},
        "text",
        {"instruction": True, "output": {"text": "x"}},
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in bad))
    with pytest.raises(DataError) as caught:
        formatter.load(path)
    for expected in (
        "7 of 9 rows",
        "line 2 (row 2): 'instruction' is null",
        "line 3 (row 3): 'output' is not text but a number (5)",
        "line 4 (row 4): 'output' is missing",
        "line 5 (row 5): 'instruction' is empty, 'output' is empty",
        "line 7 (row 7): 'output' has half of a surrogate pair",
        "'input' is not text but a list of 1",
        "line 8 (row 8): is str, not an object",
        "line 9 (row 9): 'instruction' is not text but a truth value (True), "
        "'output' is not text but an object with 'text'",
        "on_bad_rows='skip'",
    ):
        assert expected in str(caught.value)
    assert "line 6" not in str(caught.value)
    rows = formatter.load(path, on_bad_rows="skip")
    assert [row["output"] for row in rows] == ["Hello, world!", "fine"]


def test_skipping_is_said_and_leaves_something(
    formatter: AlpacaFormatter, caplog: pytest.LogCaptureFixture
) -> None:
    formatter.load([*ROWS, {"instruction": "x", "output": 3}], on_bad_rows="skip")
    assert "1 of 4 rows" in caplog.text
    assert "row 4 (index 3): 'output' is not text" in caplog.text
    with pytest.raises(DataError, match="No row of a list of 1 can be used"):
        formatter.load([{"instruction": "x", "output": 3}], on_bad_rows="skip")
    with pytest.raises(ConfigError, match="'raise' or 'skip'"):
        formatter.load(ROWS, on_bad_rows="drop")  # type: ignore[arg-type]


def test_the_number_of_printed_rows_is_limited(tokenizer: Any) -> None:
    bad = [{"instruction": "x", "output": ""}] * 90 + [{"instruction": "", "output": "x"}] * 10
    formatter = AlpacaFormatter(tokenizer, max_reported_rows=4)
    with pytest.raises(DataError) as caught:
        formatter.load(bad)
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    assert "100 of 100 rows" in lines[0]
    assert "96 more" in lines[5]
    assert "86 x 'output' is empty" in lines[6]


def test_a_missing_column_is_said_once_with_the_columns_there_are(tokenizer: Any) -> None:
    rows = [{"question": "1 + 1?", "answer": "2"}] * 50
    with pytest.raises(DataError) as caught:
        AlpacaFormatter(tokenizer).load(rows)
    assert "'question', 'answer'" in str(caught.value)
    assert "columns={'instruction': 'question'}" in str(caught.value)
    assert len(str(caught.value)) < 400
    columns = {"instruction": "question", "output": "answer"}
    loaded = AlpacaFormatter(tokenizer, columns=columns).load(rows)
    assert loaded[0] == {"instruction": "1 + 1?", "input": "", "output": "2"}


@pytest.mark.parametrize("empty", [[], {}])
def test_nothing_is_refused(formatter: AlpacaFormatter, tmp_path: Path, empty: Any) -> None:
    from datasets import Dataset

    with pytest.raises(DataError):
        formatter.load(empty)
    with pytest.raises(DataError, match="has no rows"):
        formatter.load(Dataset.from_list([]))
    for name, text in (("a.json", ""), ("b.jsonl", "\n\n"), ("c.csv", ""), ("d.json", "[]"),
                       ("e.csv", "instruction,output\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"no rows|is empty"):
            formatter.load(tmp_path / name)


@pytest.mark.parametrize(
    ("encoding", "text", "line"),
    [
        ("gb18030", "你好，世界", 3),
        ("windows-1252", "Le café d'été déjà", 3),
        ("utf-16", "Hello", 1),
        ("utf-16-be", "你好", 1),
    ],
)
def test_a_file_in_the_wrong_encoding(
    formatter: AlpacaFormatter, tmp_path: Path, encoding: str, text: str, line: int
) -> None:
    path = tmp_path / "rows.json"
    rows = f'[\n{{"instruction": "a", "output": "b"}},\n{{"instruction": "c", "output": "{text}"}}]'
    path.write_bytes(rows.encode(encoding))
    with pytest.raises(DataError) as caught:
        formatter.load(path)
    assert f"line {line}: " in str(caught.value)
    assert "UTF-8" in str(caught.value)
    assert f"iconv -f {encoding.removesuffix('-be')} -t utf-8" in str(caught.value)


def test_a_byte_order_mark_is_no_error(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    for suffix in (".json", ".jsonl", ".csv"):
        path = _write(tmp_path / f"rows{suffix}")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert list(formatter.load(path)) == ROWS


@pytest.mark.parametrize("cut", [10, 30, 60, 101, 150, 200, 229])
def test_json_that_is_cut_off(formatter: AlpacaFormatter, tmp_path: Path, cut: int) -> None:
    whole = json.dumps(ROWS, indent=1, ensure_ascii=False)
    assert cut < len(whole)
    path = tmp_path / "rows.json"
    path.write_text(whole[:cut], encoding="utf-8")
    with pytest.raises(DataError) as caught:
        formatter.load(path)
    message = str(caught.value)
    line = int(message.split("line ")[1].split(",", maxsplit=1)[0].split(":", maxsplit=1)[0])
    assert abs(line - (whole[:cut].count("\n") + 1)) <= 1, message
    assert "cut off" in message, message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"instruction": "a" "output": "b"}]', "line 1, column 22: expecting ',' delimiter"),
        (
            '[\n{"instruction": "a", "output": "b"}\n{}]',
            "line 3: ',' or ']' was expected after row 1",
        ),
        ('[\n{"instruction": "a", "output": "b"},\n]', "line 3: another row was expected"),
        ('[{"instruction": "a", "output": "b"}]\nmore', "line 2: the file was expected to end"),
        ('"text"', "line 1: an array of objects was expected"),
        ("[{'instruction': 'a'}]", "line 1, column 3: expecting property name"),
    ],
)
def test_broken_json_names_the_line_and_what_was_expected(
    formatter: AlpacaFormatter, tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        formatter.load(path)
    assert expected in str(caught.value)


def test_one_broken_line_of_json_lines(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1][:30]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        formatter.load(path)
    assert "1 of 3 rows" in str(caught.value)
    assert "line 2 (row 2)" in str(caught.value)
    assert "one complete object per line was expected" in str(caught.value)
    assert len(formatter.load(path, on_bad_rows="skip")) == 2


def test_files_under_the_wrong_suffix_and_wrapped_arrays(
    formatter: AlpacaFormatter, tmp_path: Path
) -> None:
    lines = _write(tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "array.jsonl").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    for name in ("lines.json", "array.jsonl", "wrapped.json"):
        assert list(formatter.load(tmp_path / name)) == ROWS, name


def test_separators_that_are_no_line_breaks(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "output": "a\u2028b\x85c\x1cd"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    assert list(formatter.load(path)) == rows


def test_csv_with_long_fields_wrong_counts_and_open_quotes(
    formatter: AlpacaFormatter, tmp_path: Path
) -> None:
    path = _write(tmp_path / "rows.csv", [{**ROWS[0], "output": "x" * 200_000}])
    before = csv.field_size_limit()
    assert len(formatter.load(path)[0]["output"]) == 200_000
    assert csv.field_size_limit() == before
    path.write_text('instruction,output\n"a\nb",c\nd,e,f\n')
    with pytest.raises(DataError, match=r"line 4 \(row 2\): has 3 fields, the header has 2"):
        formatter.load(path)
    path.write_text('instruction,output\na,b\nc,"d\n')
    with pytest.raises(DataError, match="line 3: not valid CSV"):
        formatter.load(path)


def test_parquet_that_is_none(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        formatter.load(path)


def test_rows_are_a_sequence(formatter: AlpacaFormatter) -> None:
    rows = formatter.load(ROWS)
    assert len(rows) == 3
    assert rows[-1] == ROWS[2]
    assert isinstance(rows[:2], Rows)
    assert list(rows[:2]) == ROWS[:2]
    assert list(rows.select([2, 0])) == [ROWS[2], ROWS[0]]
    assert rows.select([0, 1, 2]).fingerprint == rows.fingerprint
    assert rows.select([1, 0, 2]).fingerprint != rows.fingerprint
    assert rows.formatter is formatter
    assert list(formatter.load(rows)) == ROWS


def test_splitting_is_seeded_and_complete(formatter: AlpacaFormatter) -> None:
    rows = formatter.load([{**ROWS[0], "input": str(i)} for i in range(100)])
    train, held_out = rows.split(0.1, seed=1)
    assert (len(train), len(held_out)) == (90, 10)
    inputs = {row["input"] for row in train}, {row["input"] for row in held_out}
    assert not inputs[0] & inputs[1]
    assert held_out.fingerprint == rows.split(0.1, seed=1)[1].fingerprint
    assert held_out.fingerprint != rows.split(0.1, seed=2)[1].fingerprint
    for fraction in (0, 1, -0.1, True):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            rows.split(fraction)
    with pytest.raises(DataError, match="at least 2"):
        rows[:1].split(0.5)


def test_the_shared_rows(tokenizer: Any, shared_data: Path) -> None:
    english = AlpacaFormatter(tokenizer).load(shared_data / "alpaca_en_demo.json")
    assert len(english) == 999
    chinese = AlpacaFormatter(tokenizer, "alpaca-zh").load(shared_data / "alpaca_zh_demo.json")
    assert len(chinese) == 1000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("deep.json", "[" * 100_000, "cannot be read"),
        ("long.json", '[{"instruction": "a", "output": ' + "9" * 5000 + "}]", "cannot be read"),
        ("twice.csv", "instruction,output,output\na,b,c\n", "line 1: the header names 'output'"),
    ],
)
def test_odd_files_end_in_a_data_error(
    formatter: AlpacaFormatter, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        formatter.load(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "from NoneType"),
        (b"rows.json", "from bytes"),
        ("https://example.org/rows.json", "is an address"),
        ({"instruction": ["a"], "output": ["b"]}, "no split 'train'"),
    ],
)
def test_odd_sources_end_in_a_data_error(
    formatter: AlpacaFormatter, source: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        formatter.load(source)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_with_another_separator(
    formatter: AlpacaFormatter, tmp_path: Path, delimiter: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(delimiter.join(("instruction", "output")) + f'\n"a, b"{delimiter}c\n')
    assert list(formatter.load(path)) == [{"instruction": "a, b", "input": "", "output": "c"}]


def test_a_parquet_file_that_unpacks_without_end_is_refused_before_it_does(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet

    from qlora_kit.data.sources import file_readers

    monkeypatch.setattr(file_readers, "_SURELY_FITS", 2**20)
    path = tmp_path / "rows.parquet"
    column = pa.chunked_array([pa.array(["x" * 1000] * 1000)] * 40)
    pyarrow.parquet.write_table(pa.table({"instruction": column, "output": column}), path)
    with pytest.raises(DataError, match="bytes and unpacks to more than"):
        file_readers.read_file(path)
    rows = pa.table({"instruction": ["a"] * 50, "output": [f"b{n}" for n in range(50)]})
    pyarrow.parquet.write_table(rows, path)
    assert len(file_readers.read_file(path)) == 50


@pytest.mark.parametrize(
    ("name", "text"),
    [("dataset_info.json", "{"), ("state.json", "{}"), ("data-00000-of-00001.arrow", "x" * 99)],
)
def test_a_saved_dataset_that_is_not_whole_is_named(tmp_path, name, text):
    from datasets import Dataset

    Dataset.from_list([{"instruction": "a", "output": "b"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(text)
    with pytest.raises(DataError, match="save_to_disk wrote, or is not whole"):
        read_source(tmp_path / "saved")
