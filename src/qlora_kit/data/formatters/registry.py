"""A formatter from what its ``template_spec()`` said, as manifests keep it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.data.formatters.alpaca import AlpacaFormatter
from qlora_kit.data.formatters.alpaca_templates import AlpacaTemplate
from qlora_kit.data.formatters.chat import ChatFormatter
from qlora_kit.data.formatters.formatter_base import FormatterBase
from qlora_kit.data.formatters.text import PromptCompletionFormatter, TextFormatter
from qlora_kit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["formatter_from_spec"]


def formatter_from_spec(
    spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> FormatterBase:
    """The formatter that a spec describes.

    Args:
        spec: What ``template_spec()`` returned.
        tokenizer: The tokenizer of the model it belongs to.

    Raises:
        ConfigError: When the spec is of an unknown kind or lacks a key.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError(f"A formatter spec is what template_spec() returned, got {spec!r}.")
    kind = spec.get("kind")
    common = {"response_only": spec.get("response_only", False), "eos_token": spec.get("eos_token")}
    if kind == "alpaca":
        if not spec.get("prompt_input"):
            raise ConfigError(f"The formatter spec has no 'prompt_input': {dict(spec)!r}.")
        # The spec's prompts have the system text in them already.
        formatter = AlpacaFormatter(
            tokenizer,
            AlpacaTemplate(
                name=spec.get("name", "custom"),
                prompt_input=spec["prompt_input"],
                prompt_no_input=spec.get("prompt_no_input"),
                suffix=spec.get("suffix", ""),
            ),
            **common,
        )
        formatter.system = spec.get("system")
        return formatter
    if kind == "chat":
        return ChatFormatter(
            tokenizer,
            chat_template=spec.get("chat_template"),
            system=spec.get("system"),
            template_kwargs=spec.get("template_kwargs"),
            **common,
        )
    if kind == "text":
        return TextFormatter(tokenizer, **common)
    if kind == "prompt-completion":
        return PromptCompletionFormatter(tokenizer, **common)
    raise ConfigError(
        f"A formatter of kind {kind!r} cannot be rebuilt from its spec; known kinds: 'alpaca', "
        "'chat', 'prompt-completion', 'text'. Make it yourself and hand it over."
    )
