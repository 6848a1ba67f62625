"""What rows of a kind hold, as far as that takes no tokenizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from qlora_kit.data.sources.row_problems import check_text
from qlora_kit.errors import ConfigError, did_you_mean

__all__ = ["RowReader"]


class RowReader:
    """The half of a formatter that reads: roles, their columns, and whether a row fills them.

    Everything here belongs to the class, so that data can be checked before a model is loaded.
    """

    #: Roles that every row must fill with text.
    roles: ClassVar[tuple[str, ...]] = ()
    #: Roles that may be missing, null or empty.
    optional_roles: ClassVar[tuple[str, ...]] = ()
    #: Other usual names of a role's column, taken where the role's own is absent and unnamed.
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def map_columns(cls, columns: Mapping[str, str] | None) -> dict[str, str]:
        """The column of every role, where some were named.

        Raises:
            ConfigError: When there is no such role, or a column is not text.
        """
        known = (*cls.roles, *cls.optional_roles)
        if columns is not None and not isinstance(columns, Mapping):
            raise ConfigError(
                f"columns maps roles to columns, such as {{{known[0]!r}: 'question'}}; got "
                f"{columns!r}."
            )
        for role, column in (columns or {}).items():
            if role not in known:
                hint = (
                    f" It reads role -> column; did you mean {{{column!r}: {role!r}}}?"
                    if column in known
                    else did_you_mean(str(role), known)
                )
                raise ConfigError(
                    f"columns names a role {role!r}; the roles are {', '.join(known)}.{hint}"
                )
            if not isinstance(column, str):
                raise ConfigError(f"columns[{role!r}] must be a column's name, got {column!r}.")
        return {role: (columns or {}).get(role, role) for role in known}

    @classmethod
    def read_row(
        cls, row: Mapping[str, Any], columns: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """The roles of a raw row, and what is wrong with it.

        Args:
            row: A row as its source has it.
            columns: Which column holds which role, for those that were named.
        """
        mapped = cls.map_columns(columns)
        values: dict[str, Any] = {}
        reasons: list[str] = []
        if cls.aliases:
            mapped |= cls._find_aliases(row, columns)
        for role, column in mapped.items():
            value = row.get(column)
            if isinstance(value, float) and math.isnan(value):
                value = None  # how pandas says that there is nothing
            is_optional = role in cls.optional_roles
            if value is None and is_optional:
                value = ""
            reason = check_text(value, may_be_empty=is_optional)
            if column not in row and not is_optional:
                reason = "is missing"
            if reason:
                reasons.append(f"{column!r} {reason}")
            values[role] = value
        return values, reasons

    @classmethod
    def find_missing(
        cls, present: Sequence[str], columns: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The required roles whose column is not among those present, with that column.

        Args:
            present: The columns there are.
            columns: Which column holds which role, for those that were named.
        """
        mapped = cls.map_columns(columns)
        found = {*present, *cls._find_aliases(present, columns)}
        return {role: mapped[role] for role in cls.roles if mapped[role] not in found}

    @classmethod
    def list_used(
        cls, present: Sequence[str], columns: Mapping[str, str] | None = None
    ) -> set[str] | None:
        """The columns that are read, of those present.

        Returns ``None`` for a class that reads rows in a way of its own and does not say.
        """
        if not cls._reads_as_known():
            return None
        aliases = cls._find_aliases(present, columns)
        return {*cls.map_columns(columns).values(), *aliases.values()}

    @classmethod
    def _find_aliases(
        cls, present: Collection[str], columns: Mapping[str, str] | None
    ) -> dict[str, str]:
        """Roles whose column goes by another usual name here, with that name."""
        return {
            role: name
            for role, names in cls.aliases.items()
            if role not in present and role not in (columns or ())
            for name in names[::-1]
            if name in present
        }

    @classmethod
    def _reads_as_known(cls) -> bool:
        """Whether nobody else's code reads rows for this class."""
        readers = (cls.read_row, getattr(cls, "parse_row", cls.read_row))
        return all(str(reader.__module__).startswith("qlora_kit.data.") for reader in readers)
