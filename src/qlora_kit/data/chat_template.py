"""A chat template, and where in its output the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qlora_kit.data.tokenization import TextTokenizer

__all__ = ["ChatTemplate"]

_MARKER: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: Final = "qzx7"

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """Renders conversations as text and finds the assistant's turns in it.

    Args:
        text: The tokenizer whose template and special tokens are used.
        source: A template in place of the tokenizer's own.
        variables: Further variables of the template.

    Raises:
        ConfigError: When there is no template, or it cannot render a question and an answer.
    """

    def __init__(
        self,
        text: TextTokenizer,
        source: str | None,
        variables: Mapping[str, Any],
    ) -> None:
        self._text = text
        self._variables = dict(variables)
        try:
            own: str | None = text.tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            own = None
            if source is None:
                raise ConfigError(
                    "The tokenizer has no chat template, as base models often do not. Give one: "
                    "ChatFormatter(tokenizer, chat_template=...), or use AlpacaFormatter."
                ) from error
        self.source: str = source or own or ""
        self.is_tokenizers_own = self.source == own
        self.has_markers = _MARKER.search(self.source) is not None

    def render(
        self, messages: Messages, tools: Any = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Raises:
            DataError: When the template refuses the conversation, with its reason.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_spans(self, messages: Messages, tools: Any = None) -> tuple[str, list[Span]]:
        """The conversation as text, and the stretches of it that the assistant wrote.

        A stretch includes the token that ends the turn, where the template writes one.

        Raises:
            DataError: When the template refuses the conversation, or the assistant's part
                cannot be told from the rest.
        """
        text, marked = self._render(messages, tools, with_markers=self.has_markers)
        if self.has_markers:
            if not marked:
                raise DataError("the template's generation markers enclose nothing")
            return text, [(start, self._include_end(text, end)) for start, end in marked]
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._find_start(text, messages, tools, index)
            if spans and start < spans[-1][1]:
                raise DataError(f"message {index + 1} begins before the turn in front of it ends")
            spans.append((start, self._find_end(text, messages, tools, index, start)))
        return text, spans

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that the template writes after an answer, if it does."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render(probe)
        except DataError as error:
            raise ConfigError(
                f"The chat template cannot render a question and an answer: {error}"
            ) from error
        if _PROBE not in text:
            raise ConfigError("The chat template leaves out what the assistant said.")
        pattern = self._text.special_pattern
        match = pattern.search(text, text.rindex(_PROBE)) if pattern else None
        return match.group() if match else None

    def _include_end(self, text: str, end: int) -> int:
        """Some templates close the marker before the token that ends the turn."""
        if self.turn_end and text.startswith(self.turn_end, end):
            return end + len(self.turn_end)
        return end

    def _find_start(self, text: str, messages: Messages, tools: Any, index: int) -> int:
        """Where an answer begins: after the prompt it would be generated from."""
        prompt = self.render(messages[:index], tools, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # A generation prompt may open what the history leaves out, such as "<think>". The
        # answer then begins where the two part, at the last line or special token before.
        shared = _shared_start(text, prompt)
        before = self.render(messages[:index], tools)
        if not shared.startswith(before):
            raise DataError(
                f"the template rewrites what comes before message {index + 1} once it is answered, "
                "so the answer cannot be told from the rest; use a template with "
                "{% generation %} markers"
            )
        pattern = self._text.special_pattern
        ends = [match.end() for match in pattern.finditer(shared)] if pattern else []
        return max(len(before), shared.rfind("\n") + 1, *ends, 0)

    def _find_end(self, text: str, messages: Messages, tools: Any, index: int, start: int) -> int:
        if self.turn_end is not None:
            # Text of messages cannot hold it: the formatter breaks such names beforehand.
            found = text.find(self.turn_end, start)
            if found >= 0:
                return found + len(self.turn_end)
        if index == len(messages) - 1:
            return len(text)
        until = self.render(messages[: index + 1], tools)
        if not text.startswith(until):
            raise DataError(
                f"the template does not say where message {index + 1} ends; use a template with "
                "{% generation %} markers"
            )
        return len(until)

    def _render(
        self,
        messages: Messages,
        tools: Any,
        *,
        add_generation_prompt: bool = False,
        with_markers: bool = False,
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        renderer: Any = render_jinja_template  # its annotation says str, it returns two lists
        variables = {**self._text.tokenizer.special_tokens_map, **self._variables}
        try:
            texts, spans = renderer(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=with_markers,
                **variables,
            )
        # Templates index and call whatever they like; anything they trip over is the row's fault.
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"the chat template refuses it ({error})") from error
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if with_markers else []


def _shared_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    differs = (index for index, (a, b) in pairs if a != b)
    return one[: next(differs, min(len(one), len(other)))]
