"""A chat template, and where in its output the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qlora_kit.boundaries import describe_cause
from qlora_kit.data.formatters.loop_budget import LoopBudget
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.messages import Call, Setting

if TYPE_CHECKING:
    from qlora_kit.data.tokens.text_tokenizer import TextTokenizer

__all__ = ["ChatTemplate", "Turn", "find_training_template"]

_MARKER: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: Final = "qzx7"

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]
#: What a template is given beside the messages: ``tools``, and further variables.
Extras = Mapping[str, Any]
_NONE: Final[Extras] = MappingProxyType({})


class Turn(NamedTuple):
    """A stretch of a rendered conversation that the assistant wrote.

    Attributes:
        start: Where it begins.
        end: Where it ends, the token that ends the turn included.
        message: Which message it is, counted from 0; ``None`` where the template's markers do not
            tell.
    """

    start: int
    end: int
    message: int | None


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
                    "The tokenizer has no chat template, as base models often do not.",
                    advice=(
                        "Give one: ",
                        Setting("chat_template", ..., "formatter", "ChatFormatter(tokenizer, {})"),
                        ", or use ",
                        Call("AlpacaFormatter", "AlpacaFormatter"),
                        ".",
                    ),
                ) from error
        if source is not None and not isinstance(source, str):
            raise ConfigError(
                f"chat_template must be a template's text, got {type(source).__name__}."
            )
        self.source: str = source or own or ""
        self.is_tokenizers_own = self.source == own
        self.has_markers = _MARKER.search(self.source) is not None

    def render(
        self, messages: Messages, extras: Extras = _NONE, *, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Raises:
            DataError: When the template refuses the conversation, with its reason.
        """
        return self._render(messages, extras, add_generation_prompt=add_generation_prompt)[0]

    def render_spans(self, messages: Messages, extras: Extras = _NONE) -> tuple[str, list[Turn]]:
        """The conversation as text, and the stretches of it that the assistant wrote.

        A stretch includes the token that ends the turn, where the template writes one.

        Raises:
            DataError: When the template refuses the conversation, or the assistant's part
                cannot be told from the rest.
        """
        text, marked = self._render(messages, extras, with_markers=self.has_markers)
        if self.has_markers:
            if not marked:
                raise DataError("the template's generation markers enclose nothing")
            stretches = _join(marked)
            answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            owners = answers if len(answers) == len(stretches) else [None] * len(stretches)
            return text, [
                Turn(start, self._include_end(text, end), owner)
                for (start, end), owner in zip(stretches, owners, strict=True)
            ]
        spans: list[Turn] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._find_start(text, messages, extras, index)
            if spans and start < spans[-1].end:
                raise DataError(f"message {index + 1} begins before the turn in front of it ends")
            end = self._find_end(text, messages, extras, index, start)
            spans.append(Turn(start, end, index))
        return text, spans

    @property
    def turn_end(self) -> str | None:
        """The special token that a model ends an answer with, if the template writes one."""
        between, last = self._turn_ends
        # gpt-oss ends answers inside a conversation otherwise than the one it is to write.
        ending = between if between and last and last.startswith(between) else last
        if not ending or self._text.special_pattern is None:
            return None
        tokens: list[str] = self._text.special_pattern.findall(ending)
        return tokens[-1]

    @cached_property
    def _turn_ends(self) -> tuple[str | None, str | None]:
        """The special tokens after an answer inside a conversation, and after the last one."""
        try:
            question = {"role": "user", "content": "a"}
            answer = {"role": "assistant", "content": _PROBE}
            last = self._find_specials_after_probe([question, answer])
        except DataError as error:
            raise ConfigError(
                f"The chat template cannot render a question and an answer: {error}"
            ) from error
        if last is None:
            raise ConfigError("The chat template leaves out what the assistant said.")
        if not last:
            return None, None
        followed = [question, answer, question, {"role": "assistant", "content": "b"}]
        try:
            between = self._find_specials_after_probe(followed)
        except DataError:
            between = last
        if between and not between.startswith(last) and self._text.special_pattern:
            return self._text.special_pattern.findall(between)[0], last
        # What follows the end there is the beginning of the next turn.
        return last, last

    def _find_specials_after_probe(self, messages: Messages) -> str | None:
        """The first special tokens after the probe that nothing stands between."""
        text = self.render(messages)
        pattern = self._text.special_pattern
        if _PROBE not in text:
            return None
        position = text.rindex(_PROBE)
        found = ""
        while pattern and (match := pattern.search(text, position)):
            if found and match.start() != position:
                break
            found += match.group()
            position = match.end()
        return found

    def _include_end(self, text: str, end: int) -> int:
        """Some templates close the marker before the token that ends the turn."""
        for ending in sorted(filter(None, self._turn_ends), key=len, reverse=True):
            if text.startswith(ending, end):
                return end + len(ending)
        return end

    def _find_start(self, text: str, messages: Messages, extras: Extras, index: int) -> int:
        """Where an answer begins: after the prompt it would be generated from."""
        if index == 0:
            return self._find_first_start(text)
        prompt = self.render(messages[:index], extras, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # A generation prompt may open what the history leaves out, such as "<think>". The
        # answer then begins where the two part, at the last line or special token before.
        shared = _shared_start(text, prompt)
        before = self.render(messages[:index], extras)
        if not shared.startswith(before):
            raise DataError(
                f"the template rewrites what comes before message {index + 1} once it is answered, "
                "so the answer cannot be told from the rest; use a template with "
                "{% generation %} markers"
            )
        pattern = self._text.special_pattern
        ends = [match.end() for match in pattern.finditer(shared)] if pattern else []
        return max(len(before), shared.rfind("\n") + 1, *ends, 0)

    def _find_first_start(self, text: str) -> int:
        """Where a conversation's first message begins, if that is the assistant's.

        Templates cannot be asked for a prompt without messages. What they put in front of an
        answer is what they add to a question to have it answered.
        """
        question = [{"role": "user", "content": "a"}]
        asked = self.render(question, add_generation_prompt=True)
        header = asked[len(_shared_start(asked, self.render(question))) :]
        if header and (place := text.find(header)) >= 0:
            return place + len(header)
        # The prompt may open a thought after the header: as far as its last line or token.
        pattern = self._text.special_pattern
        ends = [match.end() for match in pattern.finditer(header)] if pattern else []
        ends += [place + 1 for place, letter in enumerate(header) if letter == "\n"]
        for end in sorted({end for end in ends if end < len(header)}, reverse=True):
            if (place := text.find(header[:end])) >= 0:
                return place + end
        raise DataError(
            "the conversation starts with the assistant, and the template does not say where its "
            "words begin; put a user's message in front"
        )

    def _find_end(
        self, text: str, messages: Messages, extras: Extras, index: int, start: int
    ) -> int:
        is_last = index == len(messages) - 1
        between, last = self._turn_ends
        ending = last if is_last else between
        # Text of messages cannot hold it: the formatter breaks such names beforehand.
        found = text.find(ending, start) if ending else -1
        if ending and found >= 0:
            end = found + len(ending)
            # Where turns may end in several ways, this may be the end of a later message.
            if not is_last and (between != last or messages[index].get("tool_calls")):
                self._check_before_next(text, messages, extras, index, end)
            return end
        if is_last:
            return len(text)
        until = self.render(messages[: index + 1], extras)
        if not text.startswith(until):
            raise DataError(
                f"the template does not say where message {index + 1} ends; use a template with "
                "{% generation %} markers"
            )
        return len(until)

    def _check_before_next(
        self, text: str, messages: Messages, extras: Extras, index: int, end: int
    ) -> None:
        """Refuse an end that lies behind the beginning of the next message's content."""
        following = {**messages[index + 1], "content": _PROBE}
        probed = self.render([*messages[: index + 1], following, *messages[index + 2 :]], extras)
        place = probed.find(_PROBE)
        if place < end or probed[:place] != text[:place]:
            raise DataError(
                f"the template does not say where message {index + 1} ends; use a template with "
                "{% generation %} markers"
            )

    def _render(
        self,
        messages: Messages,
        extras: Extras,
        *,
        add_generation_prompt: bool = False,
        with_markers: bool = False,
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        renderer: Any = render_jinja_template  # its annotation says str, it returns two lists
        own = {name: value for name, value in extras.items() if name != "tools"}
        variables = {**self._text.tokenizer.special_tokens_map, **self._variables, **own}
        try:
            texts, spans = renderer(
                conversations=[list(messages)],
                tools=extras.get("tools"),
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=with_markers,
                range=LoopBudget.of(self.source).make_range,
                **variables,
            )
        # Templates compute whatever they like; anything they trip over is between row and template.
        except Exception as error:
            raise DataError(
                f"the chat template refuses it ({describe_cause(error).rstrip('.')})"
            ) from error
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if with_markers else []


def find_training_template(tokenizer: Any, default: str | None = None) -> str:
    """TRL's version of the tokenizer's template for training, which keeps earlier thoughts.

    Args:
        tokenizer: The tokenizer.
        default: What to return where TRL has none; raises if ``None``.

    Raises:
        ConfigError: When TRL has none for this template.
    """
    from trl.chat_template_utils import get_training_chat_template

    try:
        found: str | None = get_training_chat_template(tokenizer)
    # Its own checks render conversations; a template may refuse those too.
    except Exception as error:
        if default is not None:
            return default
        raise ConfigError(
            f"chat_template='training' is TRL's version of the tokenizer's template, and TRL has "
            f"none ({error}). Give a template's text, or leave the argument out."
        ) from error
    return str(tokenizer.chat_template) if found is None else found


def _join(spans: Sequence[Span]) -> list[Span]:
    """Stretches that touch or overlap as one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _shared_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    differs = (index for index, (a, b) in pairs if a != b)
    return one[: next(differs, min(len(one), len(other)))]
