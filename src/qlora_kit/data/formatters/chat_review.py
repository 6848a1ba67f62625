"""What is said of conversations once all rows are read: nothing of them is lost in silence."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

from qlora_kit.data.formatters.chat_messages import KNOWN_ROLES, list_unread_keys
from qlora_kit.data.sources.rows import Rows, UnusedData
from qlora_kit.errors import did_you_mean

__all__ = ["review_keys", "review_roles", "review_wishes"]

logger = logging.getLogger(__name__)


def review_roles(rows: Rows, *, knows_developers: bool) -> None:
    """Say which roles no template knows, and what was replaced.

    Args:
        rows: Rows of conversations.
        knows_developers: Whether the template has a place for developers' messages.
    """
    roles = Counter(message["role"] for row in rows for message in row["messages"])
    for role, count in roles.items():
        if role not in KNOWN_ROLES:
            logger.warning(
                "%s messages of %s have the role %r, which carries no loss.%s",
                f"{count:,}", rows.source, role, did_you_mean(role, KNOWN_ROLES),
            )  # fmt: skip
    if roles["developer"] and not knows_developers:
        logger.warning(
            "%s messages of %s have the role 'developer', for which the template has no place; "
            "they are given as 'system'.",
            f"{roles['developer']:,}", rows.source,
        )  # fmt: skip


def review_wishes(rows: Rows) -> None:
    """Say which messages ask to be learned where only the assistant's answers are."""
    asking = sum(
        message.get("train") is True
        and (message["role"] != "assistant" or number < row.get("prompt_length", 0))
        for row in rows
        for number, message in enumerate(row["messages"])
    )
    if asking:
        logger.warning(
            "%s messages of %s ask to be learned (weight 1, or train) and are of a prompt or "
            "not the assistant's; only what the assistant answers is learned. "
            "response_only=False learns all.",
            f"{asking:,}", rows.source,
        )  # fmt: skip


def review_keys(rows: Rows, source: str) -> None:
    """Note what stands in messages, and in rows' template variables, and is read by nothing.

    Args:
        rows: Rows of conversations.
        source: The template's text.
    """
    found: dict[str, list[Any]] = {}
    for row in rows:
        for message in row["messages"]:
            for key in list_unread_keys(message, source):
                found.setdefault(f"the key {key!r} of messages", []).append(message[key])
        for key, value in row.get("chat_template_kwargs", {}).items():
            if not re.search(rf"\b{re.escape(key)}\b", source):
                found.setdefault(f"chat_template_kwargs[{key!r}]", []).append(value)
    for what, values in found.items():
        rows.note_unused(UnusedData(what, len(values), values[0]))
