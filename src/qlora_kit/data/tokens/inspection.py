"""Looking before training: examples with their trained tokens marked, and statistics."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, NamedTuple, Self

from qlora_kit.data.sources.row_problems import settle_problems
from qlora_kit.data.sources.rows import Rows, UnusedData
from qlora_kit.data.tokens.segment_ids import RowEncoding, join_segments, make_segments
from qlora_kit.errors import ConfigError, DataError, invalid_value
from qlora_kit.html_tables import make_table
from qlora_kit.values import is_whole_number

__all__ = ["DataReport", "Preview", "describe_rows", "render_preview"]

_PERCENTILES: Final = (5, 25, 50, 75, 95, 99)
# Two channels, so that a special token still says whether it is trained: colour, and underlining.
_TRAINED: Final = "\033[32m"
_PLAIN: Final = "\033[2m"
_SPECIAL: Final = "\033[4m"
_RESET: Final = "\033[0m"
#: The same two for a notebook, light or dark.
_HTML_TRAINED: Final = "background:rgba(46,160,67,.25)"
_HTML_SPECIAL: Final = "text-decoration:underline"
_HTML_LEGEND: Final = (
    f'<span style="{_HTML_TRAINED}">trained</span>, not trained, '
    f'<span style="{_HTML_SPECIAL}">special tokens</span>'
)


class Preview(str):
    """Examples as text, which a notebook shows in colours.

    Attributes:
        html: The same for a notebook.
    """

    html: str

    def __new__(cls, text: str, html: str) -> Self:
        """The text, and what a notebook shows of it."""
        made = super().__new__(cls, text)
        made.html = html
        return made

    def _repr_html_(self) -> str:
        return self.html


@dataclass(frozen=True, repr=False)
class DataReport:
    """Statistics of a data set under a formatter.

    Attributes:
        source: Where the rows came from.
        rows: Number of rows.
        tokens: Tokens of all rows, untruncated.
        trained_tokens: Of those, the tokens that carry loss.
        lengths: Length at each percentile, in tokens: ``{0: shortest, 5: ..., 100: longest}``.
        mean_length: Mean length, in tokens.
        max_length: The limit that the next three count against, in tokens.
        truncated: Rows longer than the limit.
        tokens_beyond: Tokens beyond the limit.
        without_trained_tokens: Rows of which nothing trained is within the limit.
        duplicates: Rows that repeat an earlier row exactly.
        repeated_prompts: Rows whose prompt an earlier row has with another answer.
        literal_specials: Rows whose text contains the name of a special token; it stays text.
        unused: What stands in the rows and is in no example.
        excluded: Rows with a turn that is kept from being learned.
    """

    source: str
    rows: int
    tokens: int
    trained_tokens: int
    lengths: dict[int, int]
    mean_length: float
    max_length: int
    truncated: int
    tokens_beyond: int
    without_trained_tokens: int
    duplicates: int
    repeated_prompts: int
    literal_specials: int
    unused: tuple[UnusedData, ...] = ()
    excluded: int = 0

    def __str__(self) -> str:
        lines = self._list_lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join([self.source, *(f"  {name:<{width}}  {value}" for name, value in lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return make_table(self.source, self._list_lines())

    def _list_lines(self) -> list[tuple[str, str]]:
        def share(part: int) -> str:
            return f"{part:,} ({100 * part / self.rows:.1f}%)"

        shown = ", ".join(
            f"{self.lengths[p]:,} ({name})"
            for p, name in ((0, "shortest"), (5, "5%"), (50, "half"), (95, "95%"), (100, "longest"))
        )
        lines = [
            ("rows", f"{self.rows:,}"),
            ("tokens", f"{self.tokens:,}, mean {self.mean_length:.0f} per row"),
            (
                "trained tokens",
                f"{self.trained_tokens:,} ({100 * self.trained_tokens / self.tokens:.1f}%)",
            ),
            ("length", shown),
            (f"longer than {self.max_length:,}", f"{share(self.truncated)} of the rows"),
            ("tokens beyond", f"{self.tokens_beyond:,}"),
            ("nothing to learn", f"{share(self.without_trained_tokens)} of the rows"),
            ("duplicate rows", share(self.duplicates)),
            ("repeated prompts", f"{share(self.repeated_prompts)} with another answer"),
        ]
        if self.literal_specials:
            lines.append(
                ("special tokens", f"{share(self.literal_specials)} rows name one; it stays text")
            )
        if self.excluded:
            lines.append(("not to learn", f"{share(self.excluded)} of the rows exclude a turn"))
        return [*lines, *(("not used", str(unused)) for unused in self.unused)]


def describe_rows(encoding: RowEncoding, rows: Rows, *, max_length: int) -> DataReport:
    """Statistics of rows; see :meth:`FormatterBase.describe`."""
    import numpy as np

    if not is_whole_number(max_length, at_least=1):
        raise invalid_value("max_length", "must be at least 1 token", max_length)
    lengths: list[int] = []
    trained_tokens = without = literal = excluded = 0
    seen: set[bytes] = set()
    prompts: set[bytes] = set()
    duplicates = repeated = 0
    pattern = encoding.text.special_pattern
    problems = []
    for start in range(0, len(rows), 1000):
        made = make_segments(encoding, rows, range(start, min(start + 1000, len(rows))))
        problems += made.problems
        for place, segments, (ids, trained) in zip(
            made.places, made.segments, join_segments(encoding, made.segments), strict=True
        ):
            lengths.append(len(ids))
            trained_tokens += sum(trained)
            excluded += any(segment.is_excluded for segment in segments)
            without += not any(trained[:max_length])
            literal += pattern is not None and any(
                pattern.search(s.text) for s in segments if not s.is_special
            )
            whole = _digest(rows[place])
            prompt = _digest([s.text for s in segments if not s.is_trained])
            duplicates += whole in seen
            repeated += whole not in seen and prompt in prompts
            seen.add(whole)
            prompts.add(prompt)
    settle_problems(
        problems,
        total=len(rows),
        source=rows.source,
        bad_rows=encoding.bad_rows,
    )
    if not lengths:
        raise DataError(f"No row of {rows.source} can be used; the log lists why.")
    counts = np.array(lengths)
    points = (0, *_PERCENTILES, 100)
    return DataReport(
        source=rows.source,
        rows=len(lengths),
        tokens=int(counts.sum()),
        trained_tokens=trained_tokens,
        lengths={p: round(float(np.percentile(counts, p))) for p in points},
        mean_length=float(counts.mean()),
        max_length=max_length,
        truncated=int((counts > max_length).sum()),
        tokens_beyond=int(np.maximum(counts - max_length, 0).sum()),
        without_trained_tokens=without,
        duplicates=duplicates,
        repeated_prompts=repeated,
        literal_specials=literal,
        unused=rows.unused,
        excluded=excluded,
    )


def render_preview(encoding: RowEncoding, rows: Rows, *, n: int, color: bool | None) -> Preview:
    """Examples as text; see :meth:`FormatterBase.preview`."""
    if not is_whole_number(n, at_least=1):
        raise ConfigError(f"n must be at least 1, got {n!r}.")
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    made = make_segments(encoding, rows, range(min(n, len(rows))))
    settle_problems(
        made.problems,
        total=len(rows),
        source=rows.source,
        bad_rows=encoding.bad_rows,
    )
    examples = join_segments(encoding, made.segments)
    legend = (
        f"{_TRAINED}trained{_RESET}, {_PLAIN}not trained{_RESET}, {_SPECIAL}special tokens{_RESET}"
        if color
        else "trained tokens stand between ⟦ and ⟧"
    )
    counted = f"{len(examples)} of {len(rows):,} examples"
    blocks, page = [f"{counted}; {legend}"], [_show(f"{counted}; {_HTML_LEGEND}")]
    for place, (ids, trained) in zip(made.places, examples, strict=True):
        header = f"example {place + 1}: {len(ids)} tokens, {sum(trained)} trained"
        blocks.append(f"── {header} " + "─" * max(0, 68 - len(header)))
        runs = _find_runs(encoding, ids, trained)
        blocks.append(_color(runs) if color else _bracket(runs))
        page += [_show(f"<b>{header}</b>"), _show("".join(map(_mark, runs)))]
    if rows.unused:
        blocks.append("── not in the examples " + "─" * 49)
        blocks += [str(unused) for unused in rows.unused]
        page.append(_show("<b>not in the examples</b>"))
        page += [_show(escape(str(unused))) for unused in rows.unused]
    return Preview("\n".join(blocks), "".join(page))


class _Run(NamedTuple):
    """Tokens that are decoded and shown together."""

    text: str
    is_trained: bool
    is_special: bool


def _find_runs(encoding: RowEncoding, ids: Sequence[int], trained: Sequence[bool]) -> list[_Run]:
    """Runs of tokens decoded together: one token may be only part of a character."""
    specials = {
        encoding.text.get_token_id(name)
        for name in encoding.text.special_tokens
        if name in encoding.text.tokenizer.get_vocab()
    }
    runs: list[tuple[bool, bool, list[int]]] = []
    for token, is_trained in zip(ids, trained, strict=True):
        is_special = token in specials
        if runs and runs[-1][:2] == (is_trained, is_special) and not is_special:
            runs[-1][2].append(token)
        else:
            runs.append((is_trained, is_special, [token]))
    decode: Any = encoding.text.tokenizer.decode
    return [
        _Run(decode(tokens, clean_up_tokenization_spaces=False), is_trained, is_special)
        for is_trained, is_special, tokens in runs
    ]


def _color(runs: Sequence[_Run]) -> str:
    return "".join(
        f"{_TRAINED if run.is_trained else _PLAIN}{_SPECIAL if run.is_special else ''}"
        f"{run.text}{_RESET}"
        for run in runs
    )


def _bracket(runs: Sequence[_Run]) -> str:
    text = ""
    was_trained = False
    for run in runs:
        if run.is_trained != was_trained:
            text += "⟦" if run.is_trained else "⟧"
            was_trained = run.is_trained
        text += run.text
    return text + ("⟧" if was_trained else "")


def _mark(run: _Run) -> str:
    styles = (_HTML_TRAINED if run.is_trained else "", _HTML_SPECIAL if run.is_special else "")
    style = ";".join(filter(None, styles))
    text = escape(run.text)
    return f'<span style="{style}">{text}</span>' if style else text


def _show(html: str) -> str:
    return f'<pre style="white-space:pre-wrap">{html}</pre>'


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]
