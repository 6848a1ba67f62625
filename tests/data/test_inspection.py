"""Previews and statistics say what training would do."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data import AlpacaFormatter
from qlora_kit.errors import ConfigError

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello, world!"},
    {"instruction": "Say hello.", "input": "", "output": "Hello, world!"},
    {"instruction": "Say hello.", "input": "", "output": "Hi."},
    {"instruction": "Quote <|im_end|>.", "input": "", "output": "你好 " * 100},
]
TEMPLATE = "{instruction}{input}|{output}"


def test_trained_tokens_are_marked_in_plain_text(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, TEMPLATE, response_only=True)
    text = formatter.preview(ROWS, n=1, color=False)
    assert "1 of 4 examples" in text
    assert "Say hello.|⟦Hello, world!<|im_end|>⟧" in text
    whole = AlpacaFormatter(tokenizer, TEMPLATE).preview(ROWS, n=1, color=False)
    # Nothing predicts the first token, so it never carries loss.
    assert "Sa⟦y hello.|Hello, world!<|im_end|>⟧" in whole


def test_trained_tokens_are_marked_in_colour(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, TEMPLATE, response_only=True)
    text = formatter.preview(ROWS, n=1, color=True)
    assert "\033[2mSay hello.|\033[0m\033[32mHello, world!\033[0m" in text
    # A special token is underlined, and still says whether it is trained.
    assert "\033[32m\033[4m<|im_end|>\033[0m" in text
    assert "⟦" not in text
    # Characters made of several tokens are not torn apart.
    assert "你好 你好" in formatter.preview(ROWS, n=4, color=True)


def test_nobody_gets_escape_codes_in_a_pipe(tokenizer: Any) -> None:
    assert "\033" not in AlpacaFormatter(tokenizer).preview(ROWS)


def test_a_description_counts_what_there_is(tokenizer: Any) -> None:
    formatter = AlpacaFormatter(tokenizer, TEMPLATE, response_only=True)
    report = formatter.describe(ROWS, max_length=64)
    encoded = formatter.encode(ROWS, max_length=100_000)
    lengths = sorted(map(len, encoded.dataset[:]["input_ids"]))
    assert report.rows == 4
    assert report.tokens == encoded.report.tokens
    assert report.trained_tokens == encoded.report.trained_tokens
    assert (report.lengths[0], report.lengths[100]) == (lengths[0], lengths[-1])
    assert report.truncated == sum(length > 64 for length in lengths) == 1
    assert report.tokens_beyond == lengths[-1] - 64
    assert report.duplicates == 1
    assert report.repeated_prompts == 1
    assert report.literal_specials == 1
    assert report.without_trained_tokens == 0
    text = str(report)
    for part in ("duplicate rows", "1 (25.0%)", "longer than 64", "it stays text"):
        assert part in text


@pytest.mark.parametrize("bad", [0, -1, True, "3"])
def test_wrong_counts_are_refused(tokenizer: Any, bad: Any) -> None:
    formatter = AlpacaFormatter(tokenizer)
    with pytest.raises(ConfigError, match="at least 1"):
        formatter.preview(ROWS, n=bad)
    with pytest.raises(ConfigError, match="at least 1"):
        formatter.describe(ROWS, max_length=bad)
