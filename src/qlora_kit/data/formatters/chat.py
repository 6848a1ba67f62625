"""Conversations: the tokenizer's own chat template, with loss on the assistant's turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

from qlora_kit.data.formatters.chat_columns import ChatColumns
from qlora_kit.data.formatters.chat_messages import parse_message, use_key_of_template
from qlora_kit.data.formatters.chat_review import review_keys, review_roles, review_wishes
from qlora_kit.data.formatters.chat_template import ChatTemplate, find_training_template
from qlora_kit.data.formatters.content_check import find_lost, say_lost
from qlora_kit.data.formatters.formatter_base import SpecialTokens, check_tokenizer
from qlora_kit.data.formatters.shipped_templates import take_chat_template
from qlora_kit.data.formatters.special_names import break_names, mend_names
from qlora_kit.data.sources.row_problems import BadRowPolicy
from qlora_kit.data.sources.rows import Rows
from qlora_kit.data.tokens.segments import Prompt, Segment
from qlora_kit.data.tokens.text_tokenizer import TextTokenizer
from qlora_kit.errors import DataError
from qlora_kit.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatFormatter"]

#: How a template's source says that it looks for a name in a message.
_PARSES: Final = (
    r"""(?:split|startswith|endswith|replace|find)\(\s*['"]{0}['"]|['"]{0}['"]\s+in\b"""
)


class ChatFormatter(ChatColumns):
    """Formats conversations with the model's chat template.

    Reads ``messages`` (``role``, ``content``), ShareGPT's ``conversations`` (``from``, ``value``)
    and conversations in two parts, ``prompt`` and ``completion``, of which the first is given and
    not learned; beside them ``tools`` (a list or its JSON text), ``system`` and
    ``chat_template_kwargs``. A message with ``"weight": 0`` or ``"train": false`` is not learned.
    What the template leaves out of a row refuses the row. The tokens are those of
    ``tokenizer.apply_chat_template``, cut where the assistant's turns begin and end; text of a
    message that looks like a special token stays text. With ``response_only`` loss falls on
    each assistant turn and the token that ends it:
    on what the template's ``{% generation %}`` markers enclose where it has them, otherwise on
    what comes after the prompt of that turn.

    Args:
        tokenizer: The model's tokenizer.
        response_only: Whether only the assistant's turns carry loss, or everything.
        chat_template: A template (Jinja) in place of the tokenizer's own, or the name of one:
            ``"chatml"``, or one that TRL ships, such as ``"qwen3"`` or ``"llama3"``; see
            ``qlora-kit templates``. ``"training"`` is TRL's version of the tokenizer's own, where
            TRL has one, which keeps the thoughts of earlier turns.
        eos_token: The token that ends an answer; by default the one that the template writes
            after an assistant's turn, else the tokenizer's end token.
        columns: Which column holds the conversation: ``{"messages": "dialogue"}``, or
            ``{"prompt": "asked", "completion": "said"}``.
        system: System message for conversations that have none.
        template_kwargs: Further variables of the template, such as ``{"enable_thinking": False}``.
        on_bad_rows: What to do about rows that cannot be used: ``"raise"`` or ``"skip"``.
        max_reported_rows: How many bad rows a message lists one by one.
        special_tokens: Whether the name of a special token in a message stays ``"text"`` or becomes
            the token (``"tokens"``).

    Raises:
        ConfigError: When there is no chat template, or an argument cannot work.
    """

    name = "chat"
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
        special_tokens: SpecialTokens = "text",
    ) -> None:
        check_tokenizer(tokenizer)
        self._is_training_template = chat_template == "training"
        if self._is_training_template:
            chat_template = find_training_template(tokenizer)
        self.template_kwargs = dict(template_kwargs or {})
        if chat_template is not None:
            chat_template = take_chat_template(chat_template, tokenizer, self.template_kwargs)
        self.system = system
        self.template = ChatTemplate(TextTokenizer(tokenizer), chat_template, self.template_kwargs)
        super().__init__(
            tokenizer,
            response_only=response_only,
            eos_token=eos_token,
            columns=columns,
            on_bad_rows=on_bad_rows,
            max_reported_rows=max_reported_rows,
            special_tokens=special_tokens,
        )
        #: Names of special tokens that the template looks for in messages, such as "<think>".
        self._parsed_names: dict[str, bool] = {}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The formatter whose ``template_spec()`` this was."""
        formatter = cls(
            tokenizer,
            chat_template=spec.get("chat_template"),
            system=spec.get("system"),
            template_kwargs=spec.get("template_kwargs"),
            **cls.read_common(spec),
        )
        formatter._is_training_template = spec.get("name") == "training"
        return formatter

    def _check_eos(self, eos_token: str | None) -> str:
        return super()._check_eos(eos_token or self.template.turn_end)

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The rendered conversation, cut where the assistant's turns begin and end."""
        completed = self._complete(row["messages"])
        # A system message may have come in front of the prompt of a conversation in two parts.
        given = row.get("prompt_length", 0) + len(completed) - len(row["messages"])
        mark, safe = self._protect({**row, "messages": completed})
        messages, extras = safe["messages"], _find_extras(safe)
        text, turns = self.template.render_spans(messages, extras)
        self._check_content(messages, extras, text)
        excluded = {n for n, message in enumerate(messages) if message.get("train") is False}
        answered = any(message["role"] == "assistant" for message in messages[:given])
        if (excluded or answered) and any(turn.message is None for turn in turns):
            what = "one with a weight of 0" if excluded else "one of the prompt"
            raise DataError(
                "the template's generation markers do not tell which message a turn is, so that "
                f"{what} cannot be left out; use a template without markers"
            )
        unlearned = {
            number: messages[number]["content"].strip()
            for number in sorted(excluded - {turn.message for turn in turns})
            if not self.response_only
        }
        segments: list[Segment] = []
        position = 0
        for start, end, number in turns:
            own = [n for n in unlearned if number is not None and n < number]
            words = [unlearned.pop(n) for n in own]
            segments += self._split_context(text[position:start], words)
            if number in excluded:
                segments += [
                    segment._replace(is_excluded=True)
                    for segment in self.text.split_special(text[start:end])
                ]
            elif number is not None and number < given:
                segments += self.text.split_special(text[start:end])
            else:
                segments += self._end_turn(
                    self.text.split_special(text[start:end], is_trained=True)
                )
            position = end
        segments += self._split_context(text[position:], list(unlearned.values()))
        # White space after the last turn would teach nothing and stand after the end.
        while segments and not segments[-1].is_trained and not segments[-1].text.strip():
            segments.pop()
        if segments and segments[-1].is_trained and not segments[-1].is_special:
            # The template never says that an answer is over; the end token does, once.
            segments.append(Segment(self.eos_token, is_trained=True, is_special=True))
        return mend_names(segments, mark)

    def prompt(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        input: str = "",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The conversation so far, up to where the assistant answers.

        Args:
            messages: The messages, or the text of one user message.
            input: Text to put after that user message, separated by an empty line.
            tools: Tools the assistant may call, as the template expects them.
            chat_template_kwargs: Variables of the template for this conversation, as the column
                of that name has them for a row.

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
        row: dict[str, Any] = {
            "messages": self._complete([message for message, _ in parsed]),
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        if tools is not None:
            row["tools"] = list(tools)
        mark, safe = self._protect(row)
        rendered = self.template.render(
            safe["messages"], _find_extras(safe), add_generation_prompt=True
        )
        self._check_content(safe["messages"], _find_extras(safe), rendered)
        return self.make_prompt(mend_names(self.text.split_special(rendered), mark))

    def template_spec(self) -> dict[str, Any]:
        """The chat template and its tokens as JSON values."""
        stop = [self.eos_token, self.tokenizer.eos_token]
        return super().template_spec() | {
            "name": self._name_template(),
            "chat_template": self.template.source,
            "template_kwargs": self.template_kwargs,
            "system": self.system,
            "stop": list(dict.fromkeys(token for token in stop if token)),
        }

    def review_rows(self, rows: Rows) -> None:
        """Say which roles no template knows, what was replaced, and which keys nothing reads."""
        review_roles(rows, knows_developers=self._knows_developers)
        if self.response_only:
            review_wishes(rows)
        review_keys(rows, self.template.source)

    @property
    def _knows_developers(self) -> bool:
        return "developer" in self.template.source

    def _name_template(self) -> str:
        if self.template.is_tokenizers_own:
            return "tokenizer"
        # "custom" ones are taken over by the tokenizer; this one is for training alone.
        return "training" if self._is_training_template else "custom"

    def _check_content(
        self, messages: Sequence[Mapping[str, Any]], extras: Mapping[str, Any], text: str
    ) -> None:
        """Refuse a conversation of which the template leaves something out."""
        lost = find_lost(messages, text, lambda probed: self.template.render(probed, extras))
        if lost is not None:
            raise say_lost(lost, messages, self._advice_on_reasoning)

    @cached_property
    def _advice_on_reasoning(self) -> str:
        trained = None if self._is_training_template else find_training_template(self.tokenizer, "")
        if trained and trained != self.template.source:
            return (
                "ChatFormatter(tokenizer, chat_template='training') takes TRL's version of the "
                "template, which keeps every thought"
            )
        return (
            "use a template that has a place for it, leave the reasoning of earlier turns out of "
            "the data, or make each turn a row of its own"
        )

    def _complete(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the default system message in front, if they have none."""
        own = [use_key_of_template(message, self.template.source) for message in messages]
        if not self._knows_developers:
            own = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in own
            ]
        if self.system is not None and own[0]["role"] != "system":
            own.insert(0, {"role": "system", "content": self.system})
        return own

    def _protect(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A row that the template can render without taking its text for special tokens."""
        pattern = self.text.special_pattern
        return ("", row) if pattern is None else break_names(row, pattern, self._find_parsed_names)

    def _find_parsed_names(self, present: set[str]) -> set[str]:
        """The names among those present that the template takes messages apart at.

        Qwen3's looks for "</think>" in an answer and writes the thought anew. Broken by a mark
        it would not be found, and another conversation would be rendered. What stands in the
        result then was written by the template.
        """
        for name in present - self._parsed_names.keys():
            looked_for = _PARSES.format(re.escape(name))
            self._parsed_names[name] = re.search(looked_for, self.template.source) is not None
        return {name for name in present if self._parsed_names[name]}

    def _split_context(self, text: str, unlearned: Sequence[str]) -> list[Segment]:
        """What stands between turns, without the words of messages that are not to be learned."""
        segments: list[Segment] = []
        for words in unlearned:
            if text.count(words) != 1:
                raise DataError(
                    "a message of another role than the assistant's has a weight of 0, and where "
                    "it stands in the rendered text is not certain; give response_only=True, "
                    "which learns the assistant's alone"
                )
            before, _, text = text.partition(words)
            segments += self.text.split_special(before)
            segments += [
                segment._replace(is_excluded=True) for segment in self.text.split_special(words)
            ]
        return segments + self.text.split_special(text)

    def _end_turn(self, segments: list[Segment]) -> list[Segment]:
        """Loss ends with the token that ends the turn; white space after it carries none."""
        if len(segments) > 1 and segments[-2].is_special and not segments[-1].text.strip():
            return [*segments[:-1], segments[-1]._replace(is_trained=False)]
        return segments


@hookimpl
def qlora_kit_register_formatters() -> list[type[ChatFormatter]]:
    """The built-in formatter of this module."""
    return [ChatFormatter]


def _find_extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a template is given beside the messages."""
    return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
