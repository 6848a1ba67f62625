"""Conversations: the tokenizer's own chat template, with loss on the assistant's turns."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from qlora_kit.data.formatters.chat_template import ChatTemplate
from qlora_kit.data.formatters.formatter_base import FormatterBase, check_tokenizer
from qlora_kit.data.formatters.messages import (
    KNOWN_ROLES,
    check_tool_calls,
    parse_message,
    parse_tools,
    read_json_list,
)
from qlora_kit.data.sources.row_problems import BadRowPolicy
from qlora_kit.data.sources.rows import Rows
from qlora_kit.data.tokens.segments import Prompt, Segment
from qlora_kit.data.tokens.text_tokenizer import TextTokenizer
from qlora_kit.errors import DataError, did_you_mean
from qlora_kit.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatFormatter"]

logger = logging.getLogger(__name__)

#: Columns that hold a conversation, tried in this order when none is named.
_COLUMNS: Final = ("messages", "conversations")


class ChatFormatter(FormatterBase):
    """Formats conversations with the model's chat template.

    Reads ``messages`` (``role``, ``content``) and ShareGPT's ``conversations`` (``from``,
    ``value``), and ``tools`` beside them, a list or its JSON text. The tokens are those of
    ``tokenizer.apply_chat_template``, cut where the assistant's turns begin and end; text of a
    message that looks like a special token stays text. With ``response_only`` loss falls on
    each assistant turn and the token that ends it:
    on what the template's ``{% generation %}`` markers enclose where it has them, otherwise on
    what comes after the prompt of that turn.

    Args:
        tokenizer: The model's tokenizer.
        response_only: Whether only the assistant's turns carry loss, or everything.
        chat_template: A template (Jinja) in place of the tokenizer's own.
        eos_token: The token that ends an answer; by default the one that the template writes
            after an assistant's turn, else the tokenizer's end token.
        columns: Which column holds the conversation: ``{"messages": "dialogue"}``.
        system: System message for conversations that have none.
        template_kwargs: Further variables of the template, such as ``{"enable_thinking": False}``.
        on_bad_rows: What to do about rows that cannot be used: ``"raise"`` or ``"skip"``.
        max_reported_rows: How many bad rows a message lists one by one.

    Raises:
        ConfigError: When there is no chat template, or an argument cannot work.
    """

    name = "chat"
    roles = ("messages",)
    adds_bos = False
    adds_eos = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        response_only: bool = True,
        chat_template: str | None = None,
        eos_token: str | None = None,
        columns: Mapping[str, str] | None = None,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        on_bad_rows: BadRowPolicy = "raise",
        max_reported_rows: int = 10,
    ) -> None:
        check_tokenizer(tokenizer)
        self.system = system
        self.template_kwargs = dict(template_kwargs or {})
        self.template = ChatTemplate(TextTokenizer(tokenizer), chat_template, self.template_kwargs)
        super().__init__(
            tokenizer,
            response_only=response_only,
            eos_token=eos_token,
            columns=columns,
            on_bad_rows=on_bad_rows,
            max_reported_rows=max_reported_rows,
        )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The formatter whose ``template_spec()`` this was."""
        return cls(
            tokenizer,
            chat_template=spec.get("chat_template"),
            system=spec.get("system"),
            template_kwargs=spec.get("template_kwargs"),
            **cls.read_common(spec),
        )

    def _check_eos(self, eos_token: str | None) -> str:
        return super()._check_eos(eos_token or self.template.turn_end)

    @classmethod
    def find_missing(
        cls, present: Sequence[str], columns: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Either of the usual columns will do, unless one was named."""
        if columns or not any(name in present for name in _COLUMNS):
            return super().find_missing(present, columns)
        return {}

    @classmethod
    def read_row(
        cls, row: Mapping[str, Any], columns: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """The messages of a raw row in one form, and what is wrong with them."""
        column = cls.map_columns(columns)["messages"]
        if not columns:
            column = next((name for name in _COLUMNS if row.get(name) is not None), column)
        if column not in row:
            return {}, [f"{column!r} is missing"]
        raw = read_json_list(row[column])
        if not isinstance(raw, Sequence) or isinstance(raw, str):
            return {}, [f"{column!r} is not a list of messages but {type(raw).__name__}"]
        if not raw:
            return {}, [f"{column!r} is empty"]
        messages: list[dict[str, Any]] = []
        reasons: list[str] = []
        for number, message in enumerate(raw, start=1):
            parsed, reason = parse_message(message)
            if reason:
                reasons.append(f"message {number} {reason}")
            messages.append(parsed)
        if not reasons and not any(message["role"] == "assistant" for message in messages):
            found = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
            reasons.append(f"no message is the assistant's, so nothing is learned (roles: {found})")
        parsed_row: dict[str, Any] = {"messages": messages}
        if row.get("tools"):
            parsed_row["tools"], reason = parse_tools(row["tools"])
            reasons += [reason] if reason else []
        return parsed_row, reasons

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The rendered conversation, cut where the assistant's turns begin and end."""
        mark, safe = self._protect({**row, "messages": self._complete(row["messages"])})
        text, spans = self.template.render_spans(safe["messages"], safe.get("tools"))
        check_tool_calls(safe["messages"], text)
        segments: list[Segment] = []
        position = 0
        for start, end in spans:
            segments += self.text.split_special(text[position:start])
            segments += self._end_turn(self.text.split_special(text[start:end], is_trained=True))
            position = end
        segments += self.text.split_special(text[position:])
        # White space after the last turn would teach nothing and stand after the end.
        while segments and not segments[-1].is_trained and not segments[-1].text.strip():
            segments.pop()
        if segments and segments[-1].is_trained and not segments[-1].is_special:
            # The template never says that an answer is over; the end token does, once.
            segments.append(Segment(self.eos_token, is_trained=True, is_special=True))
        return self._unprotect(segments, mark)

    def prompt(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        input: str = "",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """The conversation so far, up to where the assistant answers.

        Args:
            messages: The messages, or the text of one user message.
            input: Text to put after that user message, separated by an empty line.
            tools: Tools the assistant may call, as the template expects them.

        Returns:
            Text that also carries its ``token_ids``.

        Raises:
            DataError: When a message cannot be used.
        """
        if isinstance(messages, str):
            text = f"{messages}\n\n{input}" if input else messages
            messages = [{"role": "user", "content": text}]
        if not isinstance(messages, Sequence):
            raise DataError(f"messages is a list of messages or a text, got {messages!r}.")
        parsed = [parse_message(message) for message in messages]
        reasons = [f"message {n} {reason}" for n, (_, reason) in enumerate(parsed, 1) if reason]
        if reasons or not parsed:
            raise DataError(f"No prompt can be made: {', '.join(reasons) or 'no messages'}.")
        row: dict[str, Any] = {"messages": self._complete([message for message, _ in parsed])}
        if tools is not None:
            row["tools"] = list(tools)
        mark, safe = self._protect(row)
        rendered = self.template.render(
            safe["messages"], safe.get("tools"), add_generation_prompt=True
        )
        return self.make_prompt(self._unprotect(self.text.split_special(rendered), mark))

    def template_spec(self) -> dict[str, Any]:
        """The chat template and its tokens as JSON values."""
        stop = [self.eos_token, self.tokenizer.eos_token]
        return super().template_spec() | {
            "name": "tokenizer" if self.template.is_tokenizers_own else "custom",
            "chat_template": self.template.source,
            "template_kwargs": self.template_kwargs,
            "system": self.system,
            "stop": list(dict.fromkeys(token for token in stop if token)),
        }

    def review_rows(self, rows: Rows) -> None:
        """Say when messages have roles that no template knows: they are seen and never learned."""
        roles = Counter(message["role"] for row in rows for message in row["messages"])
        for role, count in roles.items():
            if role not in KNOWN_ROLES:
                logger.warning(
                    "%s messages of %s have the role %r, which carries no loss.%s",
                    f"{count:,}",
                    rows.source,
                    role,
                    did_you_mean(role, KNOWN_ROLES),
                )

    def _complete(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the default system message in front, if they have none."""
        own = [dict(message) for message in messages]
        if self.system is not None and own[0]["role"] != "system":
            own.insert(0, {"role": "system", "content": self.system})
        return own

    def _protect(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Break the names of special tokens in messages by a mark that is removed later.

        The template is then free to move, trim or escape the text, and whatever special
        token stands in the result was written by the template.
        """
        pattern = self.text.special_pattern
        if pattern is None or not any(pattern.search(text) for text in _find_texts(row)):
            return "", row
        text = "".join(_find_texts(row))
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        broken = _map_texts(
            row, lambda text: pattern.sub(lambda name: name[0][0] + mark + name[0][1:], text)
        )
        return mark, broken

    def _unprotect(self, segments: list[Segment], mark: str) -> list[Segment]:
        if not mark:
            return segments
        return [segment._replace(text=segment.text.replace(mark, "")) for segment in segments]

    def _end_turn(self, segments: list[Segment]) -> list[Segment]:
        """Loss ends with the token that ends the turn; white space after it carries none."""
        if len(segments) > 1 and segments[-2].is_special and not segments[-1].text.strip():
            return [*segments[:-1], segments[-1]._replace(is_trained=False)]
        return segments


@hookimpl
def qlora_kit_register_formatters() -> list[type[ChatFormatter]]:
    """The built-in formatter of this module."""
    return [ChatFormatter]


def _find_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _find_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _find_texts(inner)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, change) for inner in value]
    return value
