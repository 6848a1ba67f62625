"""Texts that are rendered already, as notebooks put them into a ``text`` column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.data.formatter import FormatterBase
from qlora_kit.data.segments import Segment

__all__ = ["TextFormatter"]


class TextFormatter(FormatterBase):
    """Formats rows whose ``text`` is the whole example; all of it carries loss.

    Here, unlike in other formatters, the names of special tokens stand for the tokens: a
    rendered template is full of them. The end token comes last once, whether the text has it
    or not, also where white space follows it as in rendered chat templates.
    """

    name = "text"
    roles = ("text",)

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The text cut at its special tokens, the end token left out."""
        segments = self.text.split_special(row["text"], is_trained=True)
        end = len(segments)
        while end and not segments[end - 1].text.strip():
            end -= 1
        if not end or not self._is_end(segments[end - 1]):
            return segments
        while end and self._is_end(segments[end - 1]):
            end -= 1
        return segments[:end]

    def _is_end(self, segment: Segment) -> bool:
        return segment.is_special and segment.text == self.eos_token
