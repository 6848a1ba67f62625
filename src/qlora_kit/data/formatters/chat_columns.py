"""Where a row holds its conversation: in one column, or in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from qlora_kit.data.formatters.chat_rows import holds_messages, read_conversation, read_two_parts
from qlora_kit.data.formatters.formatter_base import FormatterBase
from qlora_kit.errors import ConfigError

__all__ = ["ChatColumns"]

#: Columns that hold a conversation, tried in this order when none is named.
_COLUMNS: Final = ("messages", "conversations")
#: What may stand beside it.
_BESIDE: Final = ("tools", "functions", "system", "chat_template_kwargs")


class ChatColumns(FormatterBase):
    """The columns of a formatter of conversations; what they become is its subclass's."""

    roles = ("messages",)
    optional_roles = ("prompt", "completion")

    @classmethod
    def find_missing(
        cls, present: Sequence[str], columns: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Any of the usual columns will do, unless one was named."""
        parts = {role: cls.map_columns(columns)[role] for role in cls.optional_roles}
        if columns and not set(columns) & set(parts):
            return super().find_missing(present, columns)
        missing = {role: column for role, column in parts.items() if column not in present}
        if columns or not missing:
            return missing
        if any(name in present for name in _COLUMNS):
            return {}
        return super().find_missing(present, columns)

    @classmethod
    def map_columns(cls, columns: Mapping[str, str] | None) -> dict[str, str]:
        """The column of every role; a conversation is in one column or in two."""
        mapped = super().map_columns(columns)
        if columns and "messages" in columns and set(columns) & set(cls.optional_roles):
            raise ConfigError(
                "columns names 'messages' and a part of a conversation in two parts; a "
                "conversation is read from the one or from 'prompt' and 'completion'."
            )
        return mapped

    @classmethod
    def read_row(
        cls, row: Mapping[str, Any], columns: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """The messages of a raw row in one form, and what is wrong with them."""
        mapped = cls.map_columns(columns)
        prompt, completion = (mapped[role] for role in cls.optional_roles)
        if columns:
            in_parts, column = "messages" not in columns, mapped["messages"]
        else:
            filled = [name for name in _COLUMNS if row.get(name) is not None]
            column = next(iter(filled), mapped["messages"])
            in_parts = not filled and (
                row.get(completion) is not None or holds_messages(row.get(prompt))
            )
        if in_parts:
            return read_two_parts(row, prompt, completion)
        return read_conversation(row, column)

    @classmethod
    def list_used(
        cls, present: Sequence[str], columns: Mapping[str, str] | None = None
    ) -> set[str] | None:
        """The conversation, and what is read beside it."""
        mapped = cls.map_columns(columns)
        own = {mapped["messages"]}
        if set(columns or ()) & set(cls.optional_roles):
            own = {mapped[role] for role in cls.optional_roles}
        elif not columns and not own & set(present):
            own = {name for name in _COLUMNS if name in present} or set(cls.optional_roles)
        return {*own, *_BESIDE} if cls._reads_as_known() else None
