"""Docstrings as Markdown: their reStructuredText roles and blocks, as mkdocstrings reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")


class Roles(griffe.Extension):
    """``:func:`~qlora_kit.attach_lora``` becomes a link where the page has it, else code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring, if there is one."""
        del kwargs
        if obj.docstring:
            text = _ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _link(found: re.Match[str]) -> str:
    dotted = found[1]
    name = dotted.rpartition(".")[2]
    return f'<autoref identifier="{dotted}" optional><code>{name}</code></autoref>'
