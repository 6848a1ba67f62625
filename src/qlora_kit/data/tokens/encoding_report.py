"""What became of the rows when they were encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qlora_kit.messages import Setting

__all__ = ["EncodingReport", "explain_emptiness"]

_SUMMED: Final = (
    "rows", "examples", "truncated", "dropped", "without_trained_tokens", "unusable",
    "tokens", "trained_tokens", "lost_tokens", "spelled_specials",
)  # fmt: skip


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows.

    Attributes:
        rows: Rows that went in.
        examples: Examples that came out.
        truncated: Examples that were cut off at ``max_length``, and so have no end token.
        dropped: Rows left out for being longer than ``max_length``.
        without_trained_tokens: Rows left out because no token that carries loss remained.
        unusable: Rows left out because the formatter could not make an example of them.
        tokens: Tokens of all examples.
        trained_tokens: Of those, the tokens that carry loss.
        lost_tokens: Tokens that truncation and dropping took away.
        longest: Longest row before truncation, in tokens.
        max_length: The limit, in tokens.
        truncation: What was done about longer rows.
        spelled_specials: Rows whose text spells out special tokens.
        special_names: Which ones, at most ten.
        seconds: Time it took.
        is_cached: Whether an earlier result was used.
    """

    rows: int
    examples: int
    truncated: int
    dropped: int
    without_trained_tokens: int
    tokens: int
    trained_tokens: int
    lost_tokens: int
    longest: int
    max_length: int
    truncation: str
    unusable: int = 0
    spelled_specials: int = 0
    special_names: tuple[str, ...] = ()
    seconds: float = 0.0
    is_cached: bool = False

    def __str__(self) -> str:
        parts = [
            f"{self.examples:,} examples of {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained "
            f"({_percent(self.trained_tokens, self.tokens)})"
        ]
        if self.truncated:
            parts.append(
                f"{self.truncated:,} rows ({_percent(self.truncated, self.rows)}) cut off at "
                f"{self.max_length:,} tokens"
            )
        if self.dropped:
            parts.append(
                f"{self.dropped:,} rows ({_percent(self.dropped, self.rows)}) left out for being "
                f"longer than {self.max_length:,} tokens"
            )
        if self.without_trained_tokens:
            parts.append(
                f"{self.without_trained_tokens:,} rows "
                f"({_percent(self.without_trained_tokens, self.rows)}) left out because nothing "
                f"to learn fits into {self.max_length:,} tokens"
            )
        if self.unusable:
            parts.append(
                f"{self.unusable:,} rows ({_percent(self.unusable, self.rows)}) left out because "
                "they cannot be formatted"
            )
        if self.lost_tokens:
            parts.append(f"{self.lost_tokens:,} tokens lost, the longest row has {self.longest:,}")
        return "; ".join(parts)

    @property
    def has_losses(self) -> bool:
        """Whether anything of the rows was left out."""
        return bool(self.truncated or self.dropped or self.without_trained_tokens or self.unusable)

    @classmethod
    def add_up(cls, reports: Sequence[EncodingReport]) -> EncodingReport:
        """One report for the parts of a data set."""
        sums = {name: sum(getattr(report, name) for report in reports) for name in _SUMMED}
        return cls(
            **sums,
            special_names=tuple(sorted({n for report in reports for n in report.special_names}))[
                :10
            ],
            longest=max(report.longest for report in reports),
            max_length=reports[0].max_length,
            truncation=reports[0].truncation,
        )


def explain_emptiness(report: EncodingReport, source: str) -> list[str | Setting]:
    """Why no example is left, and what to do."""
    if report.unusable == report.rows:
        return [f"No row of {source} can be used; the log lists why."]
    start = f"None of the {report.rows:,} rows of {source} leaves a token to learn: "
    raised = " Raise max_length (max_seq_length of the model)."
    limit = Setting("max_length", report.max_length)
    if report.dropped:
        return [
            f"{start}{report.dropped:,} are longer than ", limit,
            f" tokens (the longest has {report.longest:,}) and ",
            Setting("truncation", report.truncation), f" leaves them out.{raised}",
        ]  # fmt: skip
    if report.longest > report.max_length:
        return [
            f"{start}the prompts alone fill ", limit,
            f" tokens (the longest row has {report.longest:,}), so that the answers, which carry "
            f"the loss, are cut off.{raised}",
        ]  # fmt: skip
    return [
        f"{start}every label after the first token is -100, which carries no loss. Set labels to "
        "the ids of the tokens to learn."
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"
