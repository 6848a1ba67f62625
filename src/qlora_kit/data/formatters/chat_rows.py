"""A conversation as data sets write it, read into the one form that formatters take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.data.formatters.chat_messages import parse_message, parse_tools, read_json
from qlora_kit.data.sources.row_problems import check_text
from qlora_kit.data.sources.rows import is_filled

__all__ = ["holds_messages", "read_conversation", "read_two_parts"]


def read_conversation(row: Mapping[str, Any], column: str) -> tuple[dict[str, Any], list[str]]:
    """The messages of a raw row with what stands beside them, and what is wrong with it.

    Args:
        row: A row as its source has it.
        column: The one that holds the conversation.
    """
    messages, reasons = _read_messages(row, column)
    if not reasons:
        reasons += _check_answered(messages, "")
    parsed_row: dict[str, Any] = {"messages": messages}
    if not reasons:
        reasons += _read_beside(row, parsed_row)
    return parsed_row, reasons


def read_two_parts(
    row: Mapping[str, Any], prompt: str, completion: str
) -> tuple[dict[str, Any], list[str]]:
    """A conversation that TRL keeps in two columns, and what is wrong with it.

    Args:
        row: A row as its source has it.
        prompt: The column of the messages that are given.
        completion: The column of those that answer them.

    Returns:
        The row, of whose ``messages`` the first ``prompt_length`` are given and not learned.
    """
    given, reasons = _read_messages(row, prompt, place=f" of {prompt!r}")
    answers, others = _read_messages(row, completion, place=f" of {completion!r}")
    reasons += others
    if not reasons:
        reasons += _check_answered(answers, f" of {completion!r}")
    parsed: dict[str, Any] = {"messages": [*given, *answers]}
    if not reasons:
        reasons += _read_beside(row, parsed)
        # A system message may have been put in front.
        parsed["prompt_length"] = len(parsed["messages"]) - len(answers)
    return parsed, reasons


def holds_messages(value: Any) -> bool:
    """Whether a column's value is a list of messages, or the JSON text of one."""
    read = read_json(value)
    if not isinstance(read, list | tuple) or not read:
        return False
    return read is value or all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in read
    )


def _read_messages(
    row: Mapping[str, Any], column: str, place: str = ""
) -> tuple[list[dict[str, Any]], list[str]]:
    if column not in row:
        return [], [f"{column!r} is missing"]
    raw = read_json(row[column])
    if isinstance(raw, str):
        return [], [
            f"{column!r} is text and not a list of messages, such as "
            '[{"role": "user", "content": "..."}]'
        ]
    if not isinstance(raw, Sequence):
        return [], [f"{column!r} is not a list of messages but {type(raw).__name__}"]
    if not raw:
        return [], [f"{column!r} is empty"]
    messages: list[dict[str, Any]] = []
    reasons: list[str] = []
    for number, message in enumerate(raw, start=1):
        parsed, reason = parse_message(message)
        if reason:
            reasons.append(f"message {number}{place} {reason}")
        messages.append(parsed)
    return messages, reasons


def _check_answered(messages: Sequence[Mapping[str, Any]], place: str) -> list[str]:
    if any(message["role"] == "assistant" for message in messages):
        return []
    found = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
    return [f"no message{place} is the assistant's, so nothing is learned (roles: {found})"]


def _read_beside(row: Mapping[str, Any], parsed: dict[str, Any]) -> list[str]:
    """What stands beside a conversation, into its row; and what is wrong with it."""
    reasons: list[str] = []
    tools = row.get("tools") or row.get("functions")
    if is_filled(tools):
        parsed["tools"], reason = parse_tools(tools)
        reasons += [reason] if reason else []
        if not row.get("tools") and parsed["tools"]:
            # OpenAI's functions, before there were tools.
            parsed["tools"] = [
                tool if "function" in tool else {"type": "function", "function": tool}
                for tool in parsed["tools"]
            ]
    system = row.get("system")
    if is_filled(system):
        reason = check_text(system)
        first = parsed["messages"][0]
        if reason:
            reasons.append(f"'system' {reason}")
        elif first["role"] != "system":
            parsed["messages"].insert(0, {"role": "system", "content": system})
        elif first["content"] != system:
            reasons.append("has a 'system' column and another system message")
    variables = read_json(row.get("chat_template_kwargs"))
    if is_filled(variables):
        if isinstance(variables, Mapping):
            parsed["chat_template_kwargs"] = dict(variables)
        else:
            reasons.append("'chat_template_kwargs' is not an object")
    return reasons
