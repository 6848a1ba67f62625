"""Whether all that a conversation says is in what the chat template made of it.

Templates drop what they do not know: roles, thoughts of earlier turns, tool calls. What is
dropped would be missing from what the model learns, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from qlora_kit.data.formatters.chat_messages import REASONING_KEYS
from qlora_kit.errors import DataError
from qlora_kit.values import is_whole_number

__all__ = ["find_lost", "say_lost"]

#: A word that no template writes by itself.
_PROBE: Final = "qzx8probe"

Messages = Sequence[Mapping[str, Any]]


class Part(NamedTuple):
    """One text of a conversation.

    Attributes:
        message: Which message it is of, counted from 0.
        key: The key of the message that holds it.
        text: The text, without white space around it, which templates trim.
        is_name: Whether it is the name of a function that is called.
    """

    message: int
    key: str
    text: str
    is_name: bool = False


def find_lost(messages: Messages, text: str, render: Callable[[Messages], str]) -> Part | None:
    """The first part of a conversation that its rendered text lacks.

    Args:
        messages: The conversation.
        text: What the template made of it.
        render: The template; asked only where a text occurs elsewhere in the conversation too, so
            that finding it once proves nothing.
    """
    parts = list(_list_parts(messages))
    everything = "\0".join(part.text for part in parts)
    for part in parts:
        if part.is_name:
            # The list of tools says the same names.
            if part.text not in text or _PROBE not in render(_probe(messages, part)):
                return part
            continue
        found, expected = text.count(part.text), everything.count(part.text)
        if found >= expected:
            continue
        if not found:
            if not _is_written_otherwise(part, text):
                return part
        # Less often than it was said: which of them is missing?
        elif part.key in messages[part.message] and _PROBE not in render(_probe(messages, part)):
            return part
    return None


def say_lost(part: Part, messages: Messages, advice: str) -> DataError:
    """What is missing and what to do, as the error to raise."""
    role = messages[part.message]["role"]
    number = part.message + 1
    shown = part.text if len(part.text) <= 40 else part.text[:37] + "..."
    if part.key in REASONING_KEYS or "</think>" in part.text:
        return DataError(
            f"the chat template leaves out the reasoning of message {number} ({shown!r}), which "
            f"would not be learned; {advice}"
        )
    if part.key == "tool_calls":
        return DataError(
            f"the chat template does not write the tool calls of message {number} ({shown!r}); use "
            "a template that knows tools"
        )
    return DataError(
        f"the chat template leaves out the {part.key} of message {number}, whose role is {role!r} "
        f"({shown!r}); use a template that knows the role, or give the message another"
    )


def _list_parts(messages: Messages) -> Iterator[Part]:
    for number, message in enumerate(messages):
        for key in (*REASONING_KEYS, "content"):
            value = message.get(key)
            if isinstance(value, str) and value.strip():
                yield Part(number, key, value.strip())
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if isinstance(function.get("name"), str):
                yield Part(number, "tool_calls", function["name"], is_name=True)
            for leaf in _list_leaves(function.get("arguments")):
                yield Part(number, "tool_calls", leaf)


def _list_leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    # True, None and 0.1 are written in more ways than one.
    elif is_whole_number(value):
        yield str(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _list_leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _list_leaves(inner)


def _is_written_otherwise(part: Part, text: str) -> bool:
    """Whether a text is there in JSON, with other white space, or as a thought and an answer."""
    said = part.text
    if any(json.dumps(said, ensure_ascii=safe)[1:-1] in text for safe in (False, True)):
        return True
    pieces = [piece for piece in said.replace("<think>", "</think>").split("</think>") if piece]
    squeezed = " ".join(text.split())
    if all(" ".join(piece.split()) in squeezed for piece in pieces):
        return True
    # Some answers of tools are JSON that a template writes anew.
    if said[:1] in "{[" and part.key == "content":
        try:
            return all(leaf in text for leaf in _list_leaves(json.loads(said)))
        except ValueError:
            return False
    return False


def _probe(messages: Messages, part: Part) -> Messages:
    probed = [dict(message) for message in messages]
    if part.key != "tool_calls":
        probed[part.message][part.key] = _PROBE
        return probed
    calls = json.dumps(probed[part.message]["tool_calls"])
    old, new = json.dumps(part.text), json.dumps(_PROBE)
    probed[part.message]["tool_calls"] = json.loads(calls.replace(old, new))
    return probed
