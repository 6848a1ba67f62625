"""Which formatter rows ask for: by their columns, or by a template that was named.

Nothing here takes a tokenizer, so that what cannot work is said before a model is loaded.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.data.formatters.alpaca import AlpacaFormatter
from qlora_kit.data.formatters.alpaca_templates import BUILTIN_TEMPLATES
from qlora_kit.data.formatters.chat import ChatFormatter
from qlora_kit.data.formatters.chat_rows import holds_messages
from qlora_kit.data.formatters.formatter_base import FormatterBase
from qlora_kit.data.formatters.registry import formatter_from_spec
from qlora_kit.data.formatters.shipped_templates import list_chat_templates
from qlora_kit.data.formatters.text import PromptCompletionFormatter, TextFormatter
from qlora_kit.data.sources.raw_rows import RawRows
from qlora_kit.data.sources.row_checks import check_columns, parse_rows
from qlora_kit.data.sources.row_problems import BadRows
from qlora_kit.data.sources.rows import is_filled
from qlora_kit.errors import ConfigError, did_you_mean
from qlora_kit.paths import expand_path
from qlora_kit.plugins import get_formatter_registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FormatterPlan",
    "choose_kind",
    "describe_templates",
    "list_templates",
    "plan_formatter",
]

logger = logging.getLogger(__name__)


def list_templates() -> tuple[str, ...]:
    """Every template that has a name: Alpaca's wordings, then the registered formatters."""
    own = (*BUILTIN_TEMPLATES, *get_formatter_registry().names())
    return tuple(dict.fromkeys((*own, *list_chat_templates())))


def describe_templates() -> list[dict[str, str]]:
    """Every template that has a name, as ``name`` and ``summary``."""
    registry = get_formatter_registry()
    described = {
        name: f"Alpaca rows: {template.system_no_input or template.prompt_input.splitlines()[0]}"
        for name, template in BUILTIN_TEMPLATES.items()
    }
    for name in registry.names():
        said = (inspect.getdoc(registry.get(name)) or "").split("\n\n")[0]
        described.setdefault(name, re.sub(r"`+|:\w+:|~[\w.]+\.", "", " ".join(said.split())))
    for name in list_chat_templates():
        described.setdefault(name, "Conversations, for a model with these tokens and no template.")
    return [{"name": name, "summary": summary} for name, summary in described.items()]


@dataclass(frozen=True)
class FormatterPlan:
    """A formatter that lacks nothing but its tokenizer.

    Attributes:
        kind: Its class.
        options: Its arguments.
        spec: What its ``template_spec()`` said; then ``options`` are only about reading rows.
    """

    kind: type[FormatterBase]
    options: Mapping[str, Any]
    spec: Mapping[str, Any] | None = None

    @classmethod
    def from_spec(cls, spec: Any, options: Mapping[str, Any]) -> FormatterPlan:
        """The plan of a formatter that was.

        Args:
            spec: What its ``template_spec()`` said.
            options: ``columns``, ``on_bad_rows`` and ``max_reported_rows``.

        Raises:
            ConfigError: When no formatter is of that kind.
        """
        if not isinstance(spec, Mapping) or "kind" not in spec:
            raise ConfigError(f"formatter is what template_spec() said, got {spec!r}.")
        return cls(_find_kind(str(spec["kind"])), options, spec)

    def check(self, source: RawRows) -> None:
        """Refuse what :meth:`FormatterBase.load` would refuse.

        Raises:
            DataError: When there are no rows, they lack a column, or some cannot be used and are
                not to be skipped.
        """
        named = self.options.get("columns")
        check_columns(
            source,
            lambda present: self.kind.find_missing(present, named),
            self.kind.map_columns(named),
        )
        # To be skipped, they are listed when the formatter loads them.
        if self.options.get("on_bad_rows", "raise") == "raise":
            parse_rows(
                source,
                lambda row: self.kind.read_row(row, named),
                BadRows("raise", self.options.get("max_reported_rows", 10)),
            )

    def make(self, tokenizer: PreTrainedTokenizerBase) -> FormatterBase:
        """The formatter.

        Raises:
            ConfigError: When this tokenizer lacks what it takes, such as a chat template.
        """
        if self.spec is None:
            return self.kind(tokenizer, **self.options)
        made = formatter_from_spec(self.spec, tokenizer)
        made.read_rows_as(**self.options)
        return made


def choose_kind(columns: Collection[str], *, in_parts: bool = False) -> type[FormatterBase]:
    """The formatter that rows with these columns ask for; Alpaca's if they name none.

    Args:
        columns: The columns, or the roles that were named.
        in_parts: Whether a prompt and its completion are lists of messages.
    """
    if "instruction" in columns:
        return AlpacaFormatter
    if "messages" in columns or "conversations" in columns:
        return ChatFormatter
    if "prompt" in columns and "completion" in columns:
        return ChatFormatter if in_parts else PromptCompletionFormatter
    return TextFormatter if "text" in columns else AlpacaFormatter


def _choose_for(
    present: Collection[str], columns: Mapping[str, str], rows: RawRows | None
) -> type[FormatterBase]:
    """What named roles ask for; where they leave that open, together with the columns there are."""
    in_parts = rows is not None and _hold_messages(
        rows, [columns.get(role, role) for role in ChatFormatter.optional_roles]
    )
    kind = choose_kind(columns or present, in_parts=in_parts)
    if (
        columns
        and kind is AlpacaFormatter
        and not {"instruction", "input", "output"} & set(columns)
    ):
        return choose_kind({*columns, *present}, in_parts=in_parts)
    return kind


def _hold_messages(rows: RawRows, columns: Collection[str]) -> bool:
    """Whether the first row that fills one of the columns has a list of messages there."""
    for row in rows.rows:
        filled = [
            row.value[name]
            for name in columns
            if isinstance(row.value, Mapping) and is_filled(row.value.get(name))
        ]
        if filled:
            return any(map(holds_messages, filled))
    return False


def plan_formatter(
    present: RawRows | Collection[str] = (),
    *,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    **options: Any,
) -> FormatterPlan:
    """A formatter as far as it can be made, and checked, without a tokenizer.

    Args:
        present: The rows that were read, or their columns; they decide where no template or
            column is named. Columns alone do not tell a prompt's text from its messages.
        template: One of :func:`list_templates`; a text with ``{instruction}``, ``{input}`` and
            ``{output}``, or a file that holds one; or a ``.jinja`` file with a chat template.
        columns: Which column holds which role.
        system: Text for the template's or the conversation's system message.
        **options: Further arguments of the formatter; ``None`` leaves one to its default.

    Raises:
        ConfigError: When there is no such template or role, or they do not go together.
    """
    given = {"columns": columns, "system": system, **options}
    if template is None:
        if isinstance(present, RawRows):
            kind = _choose_for(present.columns, columns or {}, present)
        else:
            kind = _choose_for(present, columns or {}, None)
    elif template not in BUILTIN_TEMPLATES and get_formatter_registry().claims(template):
        kind = _find_kind(template)
    else:
        kind, own = _read_template(template)
        given |= own
    kind.check_options(given)
    kind.map_columns(columns)
    return FormatterPlan(kind, {name: value for name, value in given.items() if value is not None})


def _find_kind(name: str) -> type[FormatterBase]:
    found: Any = get_formatter_registry().get(name)
    if not issubclass(found, FormatterBase):
        raise ConfigError(
            f"The formatter {name!r} ({get_formatter_registry().get_origin(name)}) cannot be named "
            "as a template, because its columns are unknown before there is a tokenizer. Make it "
            "and give it as formatter=, or derive it from qlora_kit.FormatterBase."
        )
    kind: type[FormatterBase] = found
    return kind


def _read_template(template: str) -> tuple[type[FormatterBase], dict[str, Any]]:
    if template in BUILTIN_TEMPLATES or "{" in template:
        return AlpacaFormatter, {"template": template}
    if template in list_chat_templates():
        return ChatFormatter, {"chat_template": template}
    path = expand_path(template)
    known = list_templates()
    if not path.is_file():
        raise ConfigError(
            f"There is no template {template!r}, and no such file."
            f"{did_you_mean(template, known)} Known: {', '.join(known)}. One of your own "
            "is a file with {instruction}, {input} and {output}, or a chat template in a .jinja "
            f"file.{get_formatter_registry().describe_absent()}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"The template {path} cannot be read: {error}") from error
    if path.suffix == ".jinja":
        return ChatFormatter, {"chat_template": text}
    if "{" not in text:
        raise ConfigError(
            f"The template {path} has no {{instruction}} in it. A chat template's file is called "
            "*.jinja."
        )
    # An editor's last line break is no part of what the model learns to write.
    return AlpacaFormatter, {"template": text.removesuffix("\n")}
