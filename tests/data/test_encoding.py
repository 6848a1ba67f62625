"""Encoding: truncation policies, the cache, processes, and what is said about all of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data import (
    AlpacaFormatter,
    ChatFormatter,
    FormatterBase,
    PackedCollator,
    PaddedCollator,
    Segment,
    pack_examples,
)
from qlora_kit.data.batches.packing import plan_packs
from qlora_kit.data.tokens import encoding as encoding_module
from qlora_kit.errors import ConfigError, DataError

SHORT = {"instruction": "Say.", "input": "", "output": "Hello"}
LONG = {"instruction": "Say.", "input": "", "output": "Hello, world! " * 40}
HUGE_PROMPT = {"instruction": "Say hello. " * 80, "input": "", "output": "Hello"}
TEMPLATE = "{instruction}{input}|{output}"


@pytest.fixture
def formatter(tokenizer: Any) -> AlpacaFormatter:
    return AlpacaFormatter(tokenizer, TEMPLATE, response_only=True)


def test_truncation_at_the_end_is_counted_and_warned_about(
    formatter: AlpacaFormatter, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = formatter.encode([SHORT, LONG, HUGE_PROMPT], max_length=64)
    report = encoded.report
    assert (report.rows, report.examples, len(encoded)) == (3, 2, 2)
    assert (report.truncated, report.dropped, report.without_trained_tokens) == (1, 0, 1)
    assert max(map(len, encoded.dataset[:]["input_ids"])) == 64
    eos = formatter.eos_token_id
    assert [ids[-1] == eos for ids in encoded.dataset[:]["input_ids"]] == [True, False]
    (record,) = [r for r in caplog.records if r.name == encoding_module.__name__]
    assert record.levelname == "WARNING"
    for part in ("1 rows (33.3%) cut off at 64 tokens", "1 rows (33.3%) left out because nothing"):
        assert part in record.getMessage()
        assert part in str(report)


def test_dropping_and_refusing(formatter: AlpacaFormatter) -> None:
    encoded = formatter.encode([SHORT, LONG, HUGE_PROMPT], max_length=64, truncation="drop")
    assert (encoded.report.examples, encoded.report.dropped) == (1, 2)
    assert "left out for being longer" in str(encoded.report)
    with pytest.raises(DataError) as caught:
        formatter.encode([SHORT, LONG, HUGE_PROMPT], max_length=64, truncation="error")
    for part in ("2 of 3 rows", "row 2 (index 1): ", "row 3 (index 2): ", "the limit is 64"):
        assert part in str(caught.value)
    assert formatter.encode([SHORT], max_length=64, truncation="error").report.examples == 1


def test_nothing_left_to_learn_raises_and_says_why(formatter: AlpacaFormatter) -> None:
    with pytest.raises(DataError, match="the prompts alone fill max_length=64"):
        formatter.encode([HUGE_PROMPT], max_length=64)
    with pytest.raises(DataError, match="truncation='drop' leaves them out"):
        formatter.encode([LONG], max_length=64, truncation="drop")
    with pytest.raises(DataError, match="has no rows"):
        formatter.encode([], max_length=64)


def test_everything_fine_is_only_information(
    formatter: AlpacaFormatter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="qlora_kit"):
        report = formatter.encode([SHORT], max_length=64).report
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert (report.truncated, report.dropped, report.lost_tokens) == (0, 0, 0)
    assert report.longest == report.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "at least 2 tokens"),
        ({"max_length": 10.0}, "at least 2 tokens"),
        ({"max_length": 10, "truncation": "start"}, "'end', 'drop' or 'error'"),
        ({"max_length": 10, "num_proc": 0}, "at least 1"),
    ],
)
def test_wrong_settings(formatter: AlpacaFormatter, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        formatter.encode([SHORT], **options)


def test_the_same_rows_are_encoded_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formatter = AlpacaFormatter(tokenizer)
    rows = formatter.load([{**SHORT, "output": f"Hello {i}"} for i in range(30)])
    first = formatter.encode(rows, max_length=256, cache=True)
    assert not first.report.is_cached

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoding_module, "join_segments", refuse)
    again = AlpacaFormatter(tokenizer)
    second = again.encode(again.load(list(rows)), max_length=256, cache=True)
    assert second.report.is_cached
    assert second.dataset[:] == first.dataset[:]
    assert second.report.trained_tokens == first.report.trained_tokens
    for change in (
        lambda: formatter.encode(rows, max_length=255, cache=True),
        lambda: formatter.encode(rows, max_length=256, cache=True, truncation="drop"),
        lambda: formatter.encode(rows[:-1], max_length=256, cache=True),
        lambda: formatter.encode(rows, max_length=256, cache=False),
        lambda: AlpacaFormatter(tokenizer, "alpaca-zh").encode(rows, max_length=256, cache=True),
    ):
        with pytest.raises(AssertionError, match="encoded again"):
            change()


def test_a_damaged_cache_is_mended(
    formatter: AlpacaFormatter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = formatter.encode([SHORT], max_length=256, cache=True)
    (entry,) = (tmp_path / "cache" / "encoded").iterdir()
    (entry / "state.json").write_text("{")
    second = formatter.encode([SHORT], max_length=256, cache=True)
    assert not second.report.is_cached
    assert "damaged" in caplog.text
    assert second.dataset[:] == first.dataset[:]
    assert formatter.encode([SHORT], max_length=256, cache=True).report.is_cached


def test_a_cache_that_cannot_be_written_stops_nothing(
    formatter: AlpacaFormatter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file"))
    assert len(formatter.encode([SHORT], max_length=256, cache=True)) == 1


def test_small_data_leaves_no_files(formatter: AlpacaFormatter, tmp_path: Path) -> None:
    formatter.encode([SHORT], max_length=256)
    assert not (tmp_path / "cache").exists()


def _make_chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "!"}]}
        for i in range(count)
    ]


def test_several_processes_give_the_same(tokenizer: Any) -> None:
    formatter = ChatFormatter(tokenizer)
    rows = _make_chats(2500)
    one = formatter.encode(rows, max_length=64, cache=False)
    two = formatter.encode(rows, max_length=64, cache=False, num_proc=2)
    assert two.dataset[:] == one.dataset[:]
    assert two.report.trained_tokens == one.report.trained_tokens


def test_a_script_without_a_main_guard_is_not_run_again(tiny_llama: Path, tmp_path: Path) -> None:
    """What a notebook's cells become; a formatter of the script's own goes along."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('ran')\n"
        "from transformers import AutoTokenizer\n"
        "from qlora_kit import AlpacaFormatter\n"
        "class Mine(AlpacaFormatter):\n"
        "    pass\n"
        f"formatter = Mine(AutoTokenizer.from_pretrained({str(tiny_llama)!r}))\n"
        "rows = [{'instruction': str(i), 'input': '', 'output': '!'} for i in range(1500)]\n"
        "print(len(formatter.encode(rows, max_length=64, cache=False, num_proc=2)))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.split() == ["ran", "1500"], done.stderr


def test_a_formatter_that_cannot_be_sent_tokenizes_in_one_process(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    formatter = ChatFormatter(tokenizer)
    formatter.lock = threading.Lock()  # type: ignore[attr-defined]
    assert len(formatter.encode(_make_chats(1500), max_length=64, cache=False, num_proc=2)) == 1500
    assert "cannot be sent to others" in caplog.text


def test_a_slow_tokenizer_gives_the_same_ids(tokenizer: Any) -> None:
    """Only the fast path knows the Rust tokenizer; the other goes through its public call."""

    class Slow:
        backend_tokenizer = None

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer(*args, **kwargs)

    rows = [{**SHORT, "output": "<|im_end|> 你好"}, SHORT]
    slow = AlpacaFormatter(Slow(), response_only=True)  # type: ignore[arg-type]
    assert not slow.text.is_fast
    fast = AlpacaFormatter(tokenizer, response_only=True)
    assert (
        slow.encode(rows, max_length=512).dataset[:] == fast.encode(rows, max_length=512).dataset[:]
    )
    assert slow.fingerprint


def test_collators_refuse_what_would_train_wrongly(formatter: AlpacaFormatter) -> None:
    dataset = formatter.encode([SHORT, LONG], max_length=1024).dataset
    packed = list(pack_examples(dataset, 1024))
    with pytest.raises(ConfigError, match="Use PackedCollator"):
        PaddedCollator(0)(packed)
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_token"):
        PaddedCollator(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attention must be"):
        PackedCollator(0, "flash")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        PackedCollator(0, pad_to_multiple_of=0)
    with pytest.raises(ConfigError, match="do not add up"):
        PackedCollator(0)([{**packed[0], "seq_lengths": [3]}])


def test_packing_refuses_what_does_not_fit(formatter: AlpacaFormatter) -> None:
    dataset = formatter.encode([SHORT, LONG], max_length=1024).dataset
    with pytest.raises(DataError, match=r"Example 1 has .* does not fit into rows of 64"):
        pack_examples(dataset, 64)
    with pytest.raises(ConfigError, match="'bfd' or 'sequential'"):
        pack_examples(dataset, 1024, strategy="wrapped")
    with pytest.raises(DataError, match="takes an encoded dataset"):
        pack_examples([{"input_ids": [1], "labels": [1]}], 64)  # type: ignore[arg-type]
    for collator in (PaddedCollator(0), PackedCollator(0)):
        with pytest.raises(DataError, match="needs input_ids and labels"):
            collator([{"input_ids": [1]}])
    with pytest.raises(DataError, match="no examples to pack"):
        pack_examples(dataset.select([]), 1024)


def test_the_best_fit_is_the_fullest_row_with_room() -> None:
    assert plan_packs([7, 6, 3, 1], 10) == [[0, 2], [1, 3]]
    assert plan_packs([6, 5, 4], 10, strategy="sequential") == [[0], [1, 2]]


def test_no_example_is_predicted_from_the_one_before_it() -> None:
    """Labels of someone else's making may carry loss at the first token."""
    from datasets import Dataset

    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    assert PackedCollator(0)(rows)["labels"].tolist() == [[-100, 6, -100, 8]]
    assert PaddedCollator(0)(rows)["labels"].tolist() == [[-100, 6], [-100, 8]]
    packed = pack_examples(Dataset.from_list(rows), 4)
    assert packed["labels"][0] == [-100, 6, -100, 8]


def test_packing_a_selection_packs_that_selection(formatter: AlpacaFormatter) -> None:
    """A shuffled or filtered dataset keeps its rows through an index, not in its table."""
    rows = [{**SHORT, "output": f"Hello {i}"} for i in range(20)]
    dataset = formatter.encode(rows, max_length=64).dataset
    chosen = dataset.select([5, 3, 19])
    packed = pack_examples(chosen, 64)
    tokens = sorted(token for ids in packed["input_ids"] for token in ids)
    assert tokens == sorted(token for ids in chosen["input_ids"] for token in ids)


def test_the_shared_rows_pack_almost_without_waste(tokenizer: Any, shared_data: Path) -> None:
    for name, template in (("alpaca_en_demo", "alpaca"), ("alpaca_zh_demo", "alpaca-zh")):
        formatter = AlpacaFormatter(tokenizer, template)
        encoded = formatter.encode(shared_data / f"{name}.json", max_length=2048)
        packed = pack_examples(encoded.dataset, 2048)
        assert encoded.report.tokens / (len(packed) * 2048) > 0.98, name


def test_a_cache_never_outlives_what_made_it(tokenizer: Any) -> None:
    """Changed rows, settings and the code of a formatter from elsewhere all miss the cache."""
    formatter = AlpacaFormatter(tokenizer)
    rows = formatter.load([dict(SHORT)])
    first = formatter.encode(rows, max_length=256, cache=True).dataset[:]
    rows[0]["output"] = "Changed"
    second = formatter.encode(rows, max_length=256, cache=True)
    assert not second.report.is_cached
    assert second.dataset[:]["input_ids"] != first["input_ids"]
    formatter.response_only = True
    assert formatter.encode(rows, max_length=256, cache=True).report.trained_tokens < 10

    def make(question: str) -> FormatterBase:
        class Foreign(FormatterBase):
            name = "foreign"
            roles = ("a",)

            def segments(self, row: Any) -> list[Segment]:
                return [Segment(question), Segment(row["a"], is_trained=True)]

        return Foreign(tokenizer)

    one = make("Q1").encode([{"a": "x"}], max_length=64, cache=True)
    two = make("Q2").encode([{"a": "x"}], max_length=64, cache=True)
    again = make("Q1").encode([{"a": "x"}], max_length=64, cache=True)
    assert one.dataset[:] != two.dataset[:]
    assert again.report.is_cached
    assert again.dataset[:] == one.dataset[:]


def test_a_cache_tells_formatters_with_other_ends_apart(tokenizer: Any) -> None:
    class Open(AlpacaFormatter):
        adds_eos = False

    ended = AlpacaFormatter(tokenizer).encode([SHORT], max_length=256, cache=True).dataset[0]
    encoded = Open(tokenizer).encode([SHORT], max_length=256, cache=True)
    assert not encoded.report.is_cached
    assert encoded.dataset[0]["input_ids"] == ended["input_ids"][:-1]


def test_rows_that_were_skipped_once_are_still_errors(tokenizer: Any) -> None:
    class Choosy(FormatterBase):
        roles = ("a",)

        def segments(self, row: Any) -> list[Segment]:
            if row["a"] == "bad":
                raise DataError("it is bad")
            return [Segment(row["a"], is_trained=True)]

    rows = [{"a": "good"}, {"a": "bad"}]
    skipping = Choosy(tokenizer, on_bad_rows="skip")
    assert skipping.encode(rows, max_length=64, cache=True).report.unusable == 1
    assert skipping.encode(rows, max_length=64, cache=True).report.is_cached
    with pytest.raises(DataError, match="it is bad"):
        Choosy(tokenizer).encode(rows, max_length=64, cache=True)


def test_rows_of_another_formatter_are_taken_or_refused(tokenizer: Any) -> None:
    columns = {"instruction": "question", "output": "answer"}
    rows = AlpacaFormatter(tokenizer, columns=columns).load([{"question": "a", "answer": "b"}])
    chinese = AlpacaFormatter(tokenizer, "alpaca-zh", columns=columns)
    assert len(chinese.encode(rows, max_length=512)) == 1
    assert chinese.load(rows).formatter is chinese

    class Shouting(AlpacaFormatter):
        def segments(self, row: Any) -> Any:
            return super().segments({**row, "output": row["output"].upper()})

    (example,) = Shouting(tokenizer, columns=columns).encode(rows, max_length=512).dataset
    assert tokenizer.decode(example["input_ids"]).endswith("B<|im_end|>")
    with pytest.raises(DataError, match="has a column 'messages'"):
        ChatFormatter(tokenizer).encode(rows, max_length=512)


def test_an_end_token_that_is_an_ordinary_word_stays_out_of_texts(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["words"]
    assert "lazy" not in tokenizer.all_special_tokens
    formatter = AlpacaFormatter(tokenizer, "{instruction} {input} {output}", eos_token="lazy")
    row = {"instruction": "the lazy dog", "output": "lazy"}
    (example,) = formatter.encode([row], max_length=64).dataset
    eos = tokenizer.convert_tokens_to_ids("lazy")
    assert [index for index, i in enumerate(example["input_ids"]) if i == eos] == [
        len(example["input_ids"]) - 1
    ]


def test_an_end_token_written_into_answers_is_said(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    AlpacaFormatter(tokenizer).load([SHORT, {**SHORT, "output": "Hello<|im_end|>"}])
    assert "1 answers" in caplog.text
    assert "'<|im_end|>'" in caplog.text


def test_what_pandas_calls_nothing_is_nothing(tokenizer: Any) -> None:
    rows = AlpacaFormatter(tokenizer).load([{**SHORT, "input": float("nan")}])
    assert rows[0]["input"] == ""
    with pytest.raises(DataError, match="'output' is null"):
        AlpacaFormatter(tokenizer).load([{**SHORT, "output": float("nan")}])
