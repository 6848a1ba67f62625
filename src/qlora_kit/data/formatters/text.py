"""Texts that are rendered already, as notebooks put them into a ``text`` column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.data.formatters.formatter_base import FormatterBase
from qlora_kit.data.tokens.segments import Prompt, Segment
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptCompletionFormatter", "TextFormatter"]


class TextFormatter(FormatterBase):
    """Formats rows whose ``text`` is the whole example; all of it carries loss.

    Here, unlike in other formatters, the names of special tokens stand for the tokens: a
    rendered template is full of them. The end token comes last once, whether the text has it
    or not, also where white space follows it as in rendered chat templates.
    """

    name = "text"
    roles: ClassVar[tuple[str, ...]] = ("text",)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a system text: there is no place for one."""
        if options.get("system") is not None:
            raise ConfigError(
                f"system was given, but a {cls.name!r} example is a rendered text already and has "
                "no place for it. Write it into the text."
            )
        super().check_options(options)

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The text cut at its special tokens, the end token left out."""
        return self._split(row["text"], is_trained=True)

    def prompt(self, text: str, input: str = "") -> Prompt:
        """The beginning of a text, as it is.

        Args:
            text: What the model goes on from; the names of special tokens are the tokens.
            input: More of it, after an empty line.
        """
        return self.make_prompt(self.text.split_special(_join(text, input)))

    def _split(self, text: str, *, is_trained: bool) -> list[Segment]:
        """A text cut at its special tokens, without the end token or what follows it."""
        segments = self.text.split_special(text, is_trained=is_trained)
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


class PromptCompletionFormatter(TextFormatter):
    """Formats rows of a ``prompt`` and the ``completion`` that continues it.

    Both are rendered texts, as :class:`TextFormatter` has them, and are tokenized apart, so
    that a prompt for generation is what training saw. Loss falls on the completion and the
    end token unless ``response_only=False``.
    """

    name = "prompt-completion"
    roles = ("prompt", "completion")

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, response_only: bool = True, **options: Any
    ) -> None:
        super().__init__(tokenizer, response_only=response_only, **options)

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The prompt, and the completion with the end token left out."""
        return [
            *self.text.split_special(row["prompt"]),
            *self._split(row["completion"], is_trained=True),
        ]

    @classmethod
    def read_row(
        cls, row: Mapping[str, Any], columns: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """Text in both; conversations in two parts are another formatter's."""
        values, reasons = super().read_row(row, columns)
        if any(isinstance(value, list) for value in values.values()):
            reasons.append("lists of messages are for the 'chat' formatter, ChatFormatter")
        return values, reasons


@hookimpl
def qlora_kit_register_formatters() -> list[type[TextFormatter]]:
    """The built-in formatters of this module."""
    return [TextFormatter, PromptCompletionFormatter]


def _join(text: Any, input: Any) -> str:
    for value in (text, input):
        if not isinstance(value, str):
            raise DataError(f"A prompt must be text, got {type(value).__name__}: {value!r}.")
    if not text.strip():
        raise DataError("The prompt is empty; say what the model should go on from.")
    return f"{text}\n\n{input}" if input else text
