"""Messages as data sets write them, brought into the one form that chat templates read."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from qlora_kit.data.sources.row_problems import check_text

__all__ = [
    "KNOWN_ROLES",
    "REASONING_KEYS",
    "list_unread_keys",
    "parse_message",
    "parse_tools",
    "read_json",
    "use_key_of_template",
]

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
#: Where data sets keep what was thought before an answer (DeepSeek and Qwen, OpenRouter, gpt-oss).
REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
#: Keys that are read here, and ids, which say what belongs together and mean nothing else.
_READ: Final = frozenset(
    {
        "role", "from", "content", "value", "tool_calls", "tool_call_id", "function_call",
        "weight", "train", "training", *REASONING_KEYS,
    }
)  # fmt: skip
#: What this library cannot honour, and what leaving it out would mean.
_REFUSED: Final = {
    "train_detail": "which says for parts of a message whether they are learned",
    "refusal": "a refusal, which is the answer; write it into 'content'",
    "audio": "sound, which a text model cannot learn",
    "images": "pictures, which a text model cannot learn",
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
    refused = next((key for key in _REFUSED if rest.get(key)), None)
    if refused:
        return {}, f"has {refused!r}, {_REFUSED[refused]}"
    if isinstance(rest.get("function_call"), Mapping):
        # OpenAI's calls before there were tools.
        rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
    role = _ROLES.get(role.lower(), role.lower())
    is_excluded, reason = _read_weight(rest)
    if reason:
        return {}, reason
    if is_excluded:
        rest["train"] = False
    elif "weight" in rest or "training" in rest:
        rest["train"] = True
    for key in REASONING_KEYS:
        if key in rest and not (isinstance(rest[key], str) and rest[key].strip()):
            if rest[key]:
                return {}, f"has a {key!r} that is not text but {type(rest[key]).__name__}"
            del rest[key]
    if rest.get("tool_calls"):
        calls, reason = _parse_tool_calls(rest["tool_calls"])
        if reason:
            return {}, reason
        rest["tool_calls"] = calls
    parsed = {**rest, "role": role, "content": content}
    says_more = rest.get("tool_calls") or any(key in rest for key in REASONING_KEYS)
    if not content and isinstance(content, str | None) and says_more:
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


def read_json(value: Any) -> Any:
    """A list or an object that a CSV file keeps as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def use_key_of_template(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message with its reasoning under the key that the template reads, where it reads one."""
    own = next((key for key in REASONING_KEYS if key in message), None)
    if own is None or _reads(template, own):
        return dict(message)
    read = next((key for key in REASONING_KEYS if _reads(template, key)), own)
    return {(read if key == own else key): value for key, value in message.items()}


def list_unread_keys(message: Mapping[str, Any], template: str) -> list[str]:
    """Keys of a message that neither this library nor the template reads."""
    return [
        key
        for key, value in message.items()
        if key not in _READ
        and not (key == "name" and message.get("role") == "tool")
        and value not in (None, "", [], {})
        and not _reads(template, key)
    ]


@lru_cache(maxsize=1000)
def _reads(template: str, key: str) -> bool:
    """Whether a template has the key as an attribute or an item."""
    return re.search(rf"""\.{re.escape(key)}\b|['"]{re.escape(key)}['"]""", template) is not None


def _read_weight(message: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether a message is not to be learned: OpenAI's ``weight``, axolotl's ``train(ing)``."""
    weight, train = message.get("weight", 1), message.get("train", message.get("training", True))
    if isinstance(weight, str) or weight not in (0, 1):
        return False, f"has a weight of {weight!r}; 1 learns a message and 0 does not"
    if not isinstance(train, bool):
        return False, f"has 'train' of {train!r}, which is neither true nor false"
    return not weight or not train, None


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
