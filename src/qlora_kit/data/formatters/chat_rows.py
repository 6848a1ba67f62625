"""A conversation as data sets write it, read into the one form that formatters take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.data.formatters.chat_messages import parse_message, parse_tools, read_json
from qlora_kit.data.sources.row_problems import check_text
from qlora_kit.data.sources.rows import is_filled

__all__ = ["read_conversation"]


def read_conversation(row: Mapping[str, Any], column: str) -> tuple[dict[str, Any], list[str]]:
    """The messages of a raw row with what stands beside them, and what is wrong with it.

    Args:
        row: A row as its source has it.
        column: The one that holds the conversation.
    """
    if column not in row:
        return {}, [f"{column!r} is missing"]
    raw = read_json(row[column])
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
    if not reasons:
        reasons += _read_beside(row, parsed_row)
    return parsed_row, reasons


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
