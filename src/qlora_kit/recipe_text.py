"""A recipe as TOML text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["format_recipe"]


def format_recipe(recipe: Mapping[str, Any], *, note: str = "") -> str:
    """A recipe as TOML."""
    lines = [f"# {line}".rstrip() for line in note.splitlines()]
    for section, content in recipe.items():
        plain = {name: value for name, value in content.items() if value is not None}
        if not plain:
            continue
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"{_key(name)} = {_spell(value)}" for name, value in plain.items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def _spell(value: Any) -> str:
    """A value as TOML writes it; tables in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # TOML wants a digit on both sides of the point, which Python's shortest form may lack.
        return repr(value) if math.isfinite(value) else {math.inf: "inf", -math.inf: "-inf"}.get(
            value, "nan"
        )  # fmt: skip
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_spell(one) for one in value)}]"
    if isinstance(value, Mapping):
        pairs = [f"{_key(str(k))} = {_spell(v)}" for k, v in value.items() if v is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    # What JSON escapes, TOML escapes alike, but for the delete character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
