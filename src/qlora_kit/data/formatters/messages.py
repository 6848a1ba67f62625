"""Messages as data sets write them, brought into the one form that chat templates read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qlora_kit.data.sources.row_problems import check_text
from qlora_kit.errors import DataError

__all__ = ["KNOWN_ROLES", "check_tool_calls", "parse_message", "parse_tools", "read_json_list"]

#: Roles that chat templates know.
KNOWN_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
#: ShareGPT's names for them, and others that data sets use.
_ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
#: Roles whose words may be empty: a tool can return nothing.
_MAY_BE_SILENT: Final = ("system", "tool")


def parse_message(message: Any) -> tuple[dict[str, Any], str | None]:
    """One message as ``role`` and ``content``, and what is wrong with it."""
    if not isinstance(message, Mapping):
        return {}, f"is {type(message).__name__}, not an object"
    rest = {k: v for k, v in message.items() if k not in ("from", "value") and v is not None}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not role:
        return {}, "has no 'role' (or 'from')"
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if role.lower() == "function_call" and isinstance(content, str):
        rest["tool_calls"], content = _read_function_call(content)
    role = _ROLES.get(role.lower(), role.lower())
    if rest.get("tool_calls"):
        calls, reason = _parse_tool_calls(rest["tool_calls"])
        if reason:
            return {}, reason
        rest["tool_calls"] = calls
    parsed = {**rest, "role": role, "content": content}
    if not content and isinstance(content, str | None) and rest.get("tool_calls"):
        return {**parsed, "content": ""}, None
    reason = check_text(content, may_be_empty=role in _MAY_BE_SILENT)
    return parsed, reason and f"has a content that {reason}"


def parse_tools(tools: Any) -> tuple[Any, str | None]:
    """Tool descriptions as a list; data sets often keep them as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            return None, f"'tools' is not a JSON list ({error})"
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        return None, "'tools' is not a list of objects"
    return [dict(tool) for tool in tools], None


def read_json_list(value: Any) -> Any:
    """Messages that a CSV file keeps as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def check_tool_calls(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Many templates leave tool calls out, and the empty turn would be learned in their place."""
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls") or ():
            name = call.get("function", call).get("name")
            if isinstance(name, str) and name not in text:
                raise DataError(
                    f"the chat template does not write the tool calls of message {number}; use a "
                    "template that knows tools"
                )


def _read_function_call(content: str) -> tuple[list[Any] | None, str]:
    """A ShareGPT ``function_call`` turn as tool calls; as plain text, if it is not JSON."""
    try:
        calls = json.loads(content)
    except json.JSONDecodeError:
        return None, content
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return None, content
    return [{"type": "function", "function": call} for call in calls], ""


def _parse_tool_calls(calls: Any) -> tuple[Any, str | None]:
    """Tool calls with their arguments as objects.

    OpenAI's API writes arguments as JSON text. Templates expect the object and write it as
    JSON themselves, so that the text would be learned as JSON within JSON.
    """
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        return None, "has tool_calls that are not a list of objects"
    parsed = []
    for call in calls:
        holder = call.get("function", call)
        if not isinstance(holder, Mapping):
            return None, "has a tool call whose 'function' is not an object"
        if isinstance(holder.get("arguments"), str):
            try:
                arguments = json.loads(holder["arguments"] or "{}")
            except json.JSONDecodeError as error:
                return None, f"has a tool call whose arguments are not JSON ({error})"
            holder = {**holder, "arguments": arguments}
        parsed.append({**call, "function": holder} if "function" in call else dict(holder))
    return parsed, None
