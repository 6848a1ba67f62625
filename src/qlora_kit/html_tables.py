"""Small tables for notebooks: what a result shows of itself where HTML is displayed.

Their colours are the notebook's own, so that they are readable in a dark one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["make_grid", "make_table"]

_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap"


def make_table(title: str, pairs: Iterable[tuple[str, object]]) -> str:
    """A table of names and values.

    Args:
        title: What stands above it.
        pairs: Names with what belongs to them; all of it is escaped.
    """
    rows = "".join(
        f'<tr><th style="{_CELL}">{escape(name)}</th>'
        f'<td style="{_CELL}">{escape(str(value))}</td></tr>'
        for name, value in pairs
    )
    return f"<table><caption>{escape(title)}</caption><tbody>{rows}</tbody></table>"


def make_grid(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a line of headings.

    Args:
        header: What stands above the columns.
        rows: The cells of each row; all of it is escaped.
    """
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(str(cell))}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
