"""An Ollama ``Modelfile`` that says how the model was trained to be prompted.

Template, system line and stop tokens come from the formatter that trained the model. For chat
models the Jinja template is matched, by what it renders, against a few layouts that Ollama's
Go templates can express.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Modelfile", "describe_prompt", "write_modelfile"]

_PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{(\w+)\}")

_QUOTES: Final = '"""'


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told.

    Attributes:
        template: A Go template of one turn.
        system: The default system text, or ``None``.
        stop: Texts that end an answer.
        origin: Where the template came from, one sentence.
    """

    template: str
    system: str | None
    stop: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class _ChatLayout:
    """A chat format made of fixed text around each message."""

    name: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        parts = []
        for message in messages:
            around = getattr(self, message["role"])
            parts += [around[0], message["content"], around[1]]
        return "".join(parts) + self.assistant[0]

    def go_template(self) -> str:
        around_system = ""
        if self.system is not None:
            before, after = (_escape_go(part) for part in self.system)
            around_system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"
        user, answer = (
            [_escape_go(part) for part in around] for around in (self.user, self.assistant)
        )
        return (
            f"{around_system}{{{{ if .Prompt }}}}{user[0]}{{{{ .Prompt }}}}{user[1]}{{{{ end }}}}"
            f"{answer[0]}{{{{ .Response }}}}{answer[1]}"
        )


#: The kinds of formatter that put nothing around a prompt.
_RENDERED: Final = ("text", "prompt-completion")
_AS_IT_IS: Final = "{{ .Prompt }}{{ .Response }}"

_CHAT_LAYOUTS: Final = (
    _ChatLayout(
        "ChatML",
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
    _ChatLayout(
        "Llama 3",
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    _ChatLayout(
        "Gemma",
        None,
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
    ),
    _ChatLayout(
        "Phi-3",
        ("<|system|>\n", "<|end|>\n"),
        ("<|user|>\n", "<|end|>\n"),
        ("<|assistant|>\n", "<|end|>\n"),
    ),
    _ChatLayout(
        "Zephyr",
        ("<|system|>\n", "</s>\n"),
        ("<|user|>\n", "</s>\n"),
        ("<|assistant|>\n", "</s>\n"),
    ),
    _ChatLayout("Mistral", None, ("[INST] ", " [/INST]"), (" ", "</s>")),
)


def describe_prompt(
    spec: Mapping[str, Any] | None, tokenizer: Any, stop_token_ids: Sequence[int] = ()
) -> Modelfile:
    """What Ollama should be told about a model.

    Args:
        spec: What the formatter that trained it says of itself (``template_spec()``), or
            ``None`` for a model that was not trained here.
        tokenizer: The Hugging Face tokenizer.
        stop_token_ids: Every token that ends an answer.
    """
    ends = [tokenizer.convert_ids_to_tokens(index) for index in stop_token_ids]
    stated = list(spec.get("stop") or ()) if spec else []
    stop = tuple(dict.fromkeys(text for text in (*stated, *ends, tokenizer.eos_token) if text))
    if spec and spec.get("prompt_input"):
        template, system = _describe_alpaca(spec, stop)
        origin = (
            f"The template is the {spec.get('name', 'custom')!r} one the model was trained with."
        )
        return Modelfile(template, system, stop, origin)
    if spec and spec.get("kind") in _RENDERED:
        origin = "The model was trained on rendered texts, so prompts are passed on as they are."
        return Modelfile(_AS_IT_IS, None, stop, origin)
    jinja = (spec or {}).get("chat_template") or _own_chat_template(tokenizer)
    if jinja:
        found = _match_layout(tokenizer, jinja, (spec or {}).get("template_kwargs") or {})
        if found is not None:
            layout, default_system = found
            system = (spec or {}).get("system") or default_system
            origin = f"The template is the chat template, recognized as {layout.name}."
            return Modelfile(layout.go_template(), system, stop, origin)
    origin = (
        "The chat template has no counterpart here, so prompts are passed on as they are; write "
        "the TEMPLATE by hand for chatting."
        if jinja
        else "The model has no template, so prompts are passed on as they are."
    )
    return Modelfile(_AS_IT_IS, None, stop, origin)


def write_modelfile(modelfile: Modelfile, files: Sequence[str]) -> str | None:
    """The text of a ``Modelfile``.

    Args:
        modelfile: What to say.
        files: Names of the ``.gguf`` files beside it; the first one is used.

    Returns:
        The text, or ``None`` when it cannot be written because the template itself contains
        three double quotes, for which the format has no escape.
    """
    texts = [modelfile.template, modelfile.system or "", *modelfile.stop]
    if any(_QUOTES in text or text.endswith('"') for text in texts):
        return None
    lines = [f"# {modelfile.origin}"]
    lines += [f"# FROM ./{name}" for name in files[1:]]
    lines += [f"FROM ./{files[0]}", f"TEMPLATE {_QUOTES}{modelfile.template}{_QUOTES}"]
    if modelfile.system:
        lines.append(f"SYSTEM {_QUOTES}{modelfile.system}{_QUOTES}")
    lines += [f"PARAMETER stop {_quote(text)}" for text in modelfile.stop]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}" if '"' in text or "\n" in text else f'"{text}"'


def _describe_alpaca(spec: Mapping[str, Any], stop: Sequence[str]) -> tuple[str, str | None]:
    """A prompt without an input field: Ollama has one prompt, not an instruction and an input."""
    prompt = spec.get("prompt_no_input") or spec["prompt_input"]
    system = spec.get("system")
    literal = prompt if system is None else _mark_system(prompt, system)
    go = _to_go(literal, {"instruction": "{{ .Prompt }}", "input": "", "system": "{{ .System }}"})
    end = spec.get("suffix") or ""
    end += spec.get("eos_token") or (stop[0] if stop else "")
    return f"{go}{{{{ .Response }}}}{_escape_go(end)}", system


def _mark_system(prompt: str, system: str) -> str:
    """Put the placeholder back where the formatter has filled its system text in."""
    filled = system.replace("{", "{{").replace("}", "}}")
    return prompt.replace(filled, "{system}", 1) if filled in prompt else prompt


def _to_go(prompt: str, fields: Mapping[str, str]) -> str:
    """A Python format string as a Go template."""
    parts, end = [], 0
    for match in _PLACEHOLDER.finditer(prompt):
        parts.append(_escape_go(prompt[end : match.start()]))
        name = match.group(1)
        if name is None:
            parts.append(_escape_go(match.group()[0]))
        else:
            parts.append(fields.get(name, ""))
        end = match.end()
    parts.append(_escape_go(prompt[end:]))
    return "".join(parts)


def _escape_go(text: str) -> str:
    """Literal text; two opening braces would begin an action."""
    return re.sub(r"\{(?=\{)|\{$", '{{ "{" }}', text)


def _own_chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _match_layout(
    tokenizer: Any, jinja: str, settings: Mapping[str, Any]
) -> tuple[_ChatLayout, str | None] | None:
    """The layout that renders what the Jinja template does, and the system text it adds."""
    if _writes_bos(tokenizer, jinja, settings) and not _adds_bos(tokenizer):
        # llama.cpp would not add the token either, and a template is rendered turn by turn.
        return None
    user, answer = "<the question>", "<the answer>"
    short = [{"role": "user", "content": user}]
    long = [
        *short,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "<more>"},
    ]
    told = [{"role": "system", "content": "<the rules>"}]
    for layout in _CHAT_LAYOUTS:
        rendered = _render(tokenizer, jinja, short, settings)
        if rendered is None:
            return None
        default = _default_system(layout, rendered, layout.render(short))
        with_default = [{"role": "system", "content": default}] if default else []
        conversations = [with_default + short, with_default + long]
        matches = all(
            _render(tokenizer, jinja, conversation[len(with_default) :], settings)
            == layout.render(conversation)
            for conversation in conversations
        )
        if layout.system is not None:
            matches = matches and _render(
                tokenizer, jinja, told + short, settings
            ) == layout.render(told + short)
        if matches:
            return layout, default
    return None


def _default_system(layout: _ChatLayout, rendered: str, plain: str) -> str | None:
    if layout.system is None or not rendered.endswith(plain):
        return None
    added = rendered.removesuffix(plain)
    before, after = layout.system
    if added.startswith(before) and added.endswith(after):
        return added[len(before) : len(added) - len(after)] or None
    return None


def _writes_bos(tokenizer: Any, jinja: str, settings: Mapping[str, Any]) -> bool:
    """Whether the template itself puts the beginning-of-text token in."""
    messages = [{"role": "user", "content": "x"}]
    with_mark = _render(tokenizer, jinja, messages, {**settings, "bos_token": "<the beginning>"})
    return with_mark is not None and "<the beginning>" in with_mark


def _adds_bos(tokenizer: Any) -> bool:
    ids: list[int] = tokenizer("x")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _render(
    tokenizer: Any, jinja: str, messages: list[dict[str, str]], settings: Mapping[str, Any]
) -> str | None:
    """What the Jinja template makes of messages.

    Without the beginning-of-text token, which llama.cpp adds by itself. Its text may begin a
    turn as well, as in SmolLM2, so it is taken from the template and not from the result.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=jinja,
            tokenize=False,
            add_generation_prompt=True,
            **{"bos_token": "", **settings},
        )
    except (TemplateError, TypeError, KeyError, ValueError):
        # A template may refuse a conversation, such as one with a system message.
        return None
    return text
