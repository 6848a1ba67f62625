"""Chat templates by name, for base models that have none: those that TRL ships, and ChatML."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from qlora_kit.errors import ConfigError, did_you_mean

__all__ = ["list_chat_templates", "read_chat_template", "take_chat_template"]

#: What most base models of the last years have tokens for.
_CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Those that need pictures.
_OTHERS: Final = re.compile(r"_vl$|vlm|llava|idefics|diffusion")
_MARKERS: Final = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|</?s>")


@cache
def _list_files() -> dict[str, Path]:
    found = importlib.util.find_spec("trl")
    places = [] if found is None else found.submodule_search_locations or []
    return {
        path.stem: path
        for place in places
        for path in sorted((Path(place) / "chat_templates").glob("*.jinja"))
        if not path.stem.endswith("_training") and not _OTHERS.search(path.stem)
    }


def list_chat_templates() -> tuple[str, ...]:
    """Names of chat templates that need no file of one's own."""
    return ("chatml", *_list_files())


def read_chat_template(name: str) -> str | None:
    """The template of that name; ``None`` where there is none."""
    if name == "chatml":
        return _CHATML
    path = _list_files().get(name)
    return None if path is None else path.read_text(encoding="utf-8")


def take_chat_template(template: object, tokenizer: Any, variables: Mapping[str, Any]) -> str:
    """A template's text, of one that was named or given.

    Args:
        template: Text, or a name of :func:`list_chat_templates`.
        tokenizer: The model's tokenizer.
        variables: What the template is given beside the messages.

    Raises:
        ConfigError: When it is neither, or writes marks that the model has no tokens for.
    """
    if not isinstance(template, str):
        raise ConfigError(f"chat_template must be text or a name, got {template!r}.")
    named = read_chat_template(template)
    if named is None:
        _refuse_name(template)
        return template
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = tokenizer.apply_chat_template(
            short, chat_template=named, tokenize=False, **variables
        )
    # What the template lacks in this tokenizer, such as a beginning token.
    except Exception:  # noqa: BLE001
        rendered = named
    _check_markers(template, str(rendered), tokenizer)
    return named


def _refuse_name(template: str) -> None:
    """Refuse what was meant to name a template, or a file, and would be taken for its text."""
    if "{" in template:
        return
    if "\n" not in template and len(template) < 500 and Path(template).is_file():
        advice = " It is a file: give Path(...).read_text()."
    else:
        advice = did_you_mean(template.lower(), list_chat_templates()) or (
            " Names are listed by qlora-kit templates."
        )
    raise ConfigError(
        f"There is no chat template {template[:80]!r}, and as a template's text it has no place "
        f"for a message.{advice}",
        parameter="chat_template",
        value=template,
    )


def _check_markers(name: str, rendered: str, tokenizer: Any) -> None:
    """Refuse a template whose marks are no tokens of the model: no answer could end with one.

    Args:
        name: The template.
        rendered: A short conversation in it.
        tokenizer: The model's tokenizer.

    Raises:
        ConfigError: With the marks that are missing, and the templates that would go.
    """
    known = tokenizer.get_vocab()
    missing = [mark for mark in dict.fromkeys(_MARKERS.findall(rendered)) if mark not in known]
    if not missing:
        return
    fitting = [
        other
        for other in list_chat_templates()
        if (marks := set(_MARKERS.findall(read_chat_template(other) or "")))
        and any(mark in known for mark in marks)
    ]
    advice = f"It has those of: {', '.join(fitting[:8])}. " if fitting else ""
    raise ConfigError(
        f"The chat template {name!r} writes {', '.join(missing)}, which this model's tokenizer has "
        f"no tokens for. {advice}Or use an Alpaca template, which is plain text.",
        parameter="chat_template",
        value=name,
    )
