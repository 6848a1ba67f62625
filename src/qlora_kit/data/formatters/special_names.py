"""Names of special tokens in messages, broken so that nothing takes them for the tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlora_kit.data.tokens.segments import Segment

__all__ = ["break_names", "mend_names"]


def break_names(
    row: dict[str, Any], pattern: re.Pattern[str], find_kept: Callable[[set[str]], set[str]]
) -> tuple[str, dict[str, Any]]:
    """Break the names of special tokens in a row by a mark that :func:`mend_names` removes.

    The template is then free to move, trim or escape the text, and whatever special token stands
    in the result was written by the template.

    Args:
        row: Messages and what stands beside them.
        pattern: What finds a name.
        find_kept: Which of the names that occur are to stay whole.

    Returns:
        The mark, empty where nothing was broken, and the row.
    """
    text = "".join(_find_texts(row))
    present = set(pattern.findall(text))
    if not present:
        return "", row
    kept = find_kept(present)
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)

    def break_name(name: re.Match[str]) -> str:
        return name[0] if name[0] in kept else name[0][0] + mark + name[0][1:]

    return mark, _map_texts(row, lambda text: pattern.sub(break_name, text))


def mend_names(segments: list[Segment], mark: str) -> list[Segment]:
    """The segments of a rendered row with the names in them whole again."""
    if not mark:
        return segments
    return [segment._replace(text=segment.text.replace(mark, "")) for segment in segments]


def _find_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _find_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _find_texts(inner)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, change) for inner in value]
    return value
