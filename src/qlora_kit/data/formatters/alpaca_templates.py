"""Alpaca templates: their wording, their placeholders, and what a row looks like in them.

Text only: no tokens yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter as _FormatParser
from typing import Final

from qlora_kit.errors import ConfigError, did_you_mean

__all__ = ["BUILTIN_TEMPLATES", "AlpacaTemplate", "resolve_template"]

_NAMES: Final = ("instruction", "input", "output", "system")


@dataclass(frozen=True)
class AlpacaTemplate:
    """The text around an instruction, its optional input and its answer.

    The prompts are format strings with ``{instruction}``, ``{input}`` and, where a system
    text may stand, ``{system}``; a literal brace is doubled. They end where the answer
    begins.

    Attributes:
        name: What logs and manifests call it.
        prompt_input: The prompt of a row with an input.
        prompt_no_input: The prompt of a row without one; ``None`` uses ``prompt_input`` with an
            empty input.
        suffix: Text after the answer, usually nothing: the formatter adds the end token itself.
        system_input: What ``{system}`` says in ``prompt_input`` unless the caller says otherwise.
        system_no_input: The same in ``prompt_no_input``.
    """

    name: str
    prompt_input: str
    prompt_no_input: str | None = None
    suffix: str = ""
    system_input: str = ""
    system_no_input: str = ""

    def __post_init__(self) -> None:
        _check_placeholders(self.prompt_input, ("instruction", "input", "system"), self.name)
        if self.prompt_no_input is not None:
            _check_placeholders(self.prompt_no_input, ("instruction", "system"), self.name)
        for prompt in (self.prompt_input, self.prompt_no_input):
            if prompt is not None and "instruction" not in _placeholders(prompt):
                raise ConfigError(
                    f"The template {self.name!r} has a prompt without {{instruction}}: {prompt!r}."
                )

    def with_system(self, system: str | None) -> AlpacaTemplate:
        """The template with ``{system}`` filled in, by ``system`` or its own default."""
        if system is not None and "system" not in _placeholders(self.prompt_input):
            raise ConfigError(
                f"system was given, but the template {self.name!r} has no {{system}} placeholder. "
                "Add it where the text should stand, or write the text into the template."
            )
        no_input = self.prompt_no_input
        return AlpacaTemplate(
            name=self.name,
            prompt_input=_fill(
                self.prompt_input, system=self.system_input if system is None else system
            ),
            prompt_no_input=None
            if no_input is None
            else _fill(no_input, system=self.system_no_input if system is None else system),
            suffix=self.suffix,
        )


def resolve_template(template: str | AlpacaTemplate | None) -> AlpacaTemplate:
    """A template by name, from its text, or as it is.

    A text needs ``{instruction}``, ``{input}`` and ``{output}``, or the three bare ``{}`` of the
    classic notebook (two: no input).

    Raises:
        ConfigError: When the name is unknown or the text lacks a placeholder.
    """
    if template is None:
        return BUILTIN_TEMPLATES["alpaca"]
    if isinstance(template, AlpacaTemplate):
        return template
    if not isinstance(template, str):
        raise ConfigError(
            f"template must be a name ({', '.join(BUILTIN_TEMPLATES)}), a text with "
            f"{{instruction}}, {{input}} and {{output}}, or an AlpacaTemplate; got {template!r}."
        )
    if template in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[template]
    if "{" not in template:
        raise ConfigError(
            f"There is no template {template!r}.{did_you_mean(template, BUILTIN_TEMPLATES)} Known: "
            f"{', '.join(BUILTIN_TEMPLATES)}. A template of your own is a text with "
            "{instruction}, {input} and {output}."
        )
    return _parse_custom(template)


def _parse_custom(text: str) -> AlpacaTemplate:
    fields = _placeholders(text)
    if fields and set(fields) == {""}:
        text = _name_bare_placeholders(text, len(fields))
    _check_placeholders(text, _NAMES, "of your own")
    fields = _placeholders(text)
    if fields.count("output") != 1:
        raise ConfigError(
            f"A template needs {{output}} exactly once, where the answer stands; this one has it "
            f"{fields.count('output')} times: {text!r}."
        )
    prompt, suffix = _split_at_output(text)
    if _placeholders(suffix):
        raise ConfigError(
            f"Nothing but fixed text may follow {{output}}, since the answer ends the example; "
            f"this template has {suffix!r} there."
        )
    return AlpacaTemplate(name="custom", prompt_input=prompt, suffix=suffix.format())


def _parse(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(_FormatParser().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"The template cannot be read ({error}): {text!r}. A literal brace is written double: "
            "{{ or }}."
        ) from error


def _placeholders(text: str) -> list[str]:
    return [name for _, name, _, _ in _parse(text) if name is not None]


def _check_placeholders(text: str, allowed: tuple[str, ...], template_name: str) -> None:
    for _, name, spec, conversion in _parse(text):
        if name is None:
            continue
        if name not in allowed or spec or conversion:
            raise ConfigError(
                f"The template {template_name} has a placeholder {{{name}}} that is not one of "
                f"{', '.join('{' + a + '}' for a in allowed)}.{did_you_mean(name, allowed)} "
                "A literal brace is written double: {{ or }}."
            )


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _name_bare_placeholders(text: str, count: int) -> str:
    names = {3: ("instruction", "input", "output"), 2: ("instruction", "output")}.get(count)
    if names is None:
        raise ConfigError(
            f"A template with bare {{}} needs three of them (instruction, input, output) or two "
            f"(instruction, output); this one has {count}: {text!r}."
        )
    remaining = iter(names)
    return "".join(
        _escape(literal) + ("" if name is None else "{" + next(remaining) + "}")
        for literal, name, _, _ in _parse(text)
    )


def _split_at_output(text: str) -> tuple[str, str]:
    before: list[str] = []
    parts = before
    after: list[str] = []
    for literal, name, _, _ in _parse(text):
        parts.append(_escape(literal))
        if name == "output":
            parts = after
        elif name is not None:
            parts.append("{" + name + "}")
    return "".join(before), "".join(after)


def _fill(text: str, *, system: str) -> str:
    return "".join(
        _escape(literal)
        + ("" if name is None else _escape(system) if name == "system" else "{" + name + "}")
        for literal, name, _, _ in _parse(text)
    )


_ALPACA_BODY: Final = "{system}\n\n### Instruction:\n{instruction}\n\n"

BUILTIN_TEMPLATES: Final[Mapping[str, AlpacaTemplate]] = {
    # Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT).
    "alpaca": AlpacaTemplate(
        name="alpaca",
        prompt_input=_ALPACA_BODY + "### Input:\n{input}\n\n### Response:\n",
        prompt_no_input=_ALPACA_BODY + "### Response:\n",
        system_input=(
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request."
        ),
        system_no_input=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request."
        ),
    ),
    # No Chinese wording is the one that all use; this translation is in many scripts.
    "alpaca-zh": AlpacaTemplate(
        name="alpaca-zh",
        prompt_input="{system}\n\n### 指令：\n{instruction}\n\n### 输入：\n{input}\n\n### 回答：\n",
        prompt_no_input="{system}\n\n### 指令：\n{instruction}\n\n### 回答：\n",
        system_input="以下是描述任务的指令，以及提供更多上下文的输入。请写出恰当完成该请求的回答。",
        system_no_input="以下是描述任务的指令。请写出恰当完成该请求的回答。",
    ),
}
