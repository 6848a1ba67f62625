"""How a command asks a model: as it was trained, as it was told to, or as seems plainest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_kit.errors import ConfigError

__all__ = ["AskingForm", "AskingPlan", "read_form"]


class AskingForm(NamedTuple):
    """A formatter, at work.

    Attributes:
        formatter: Makes prompts.
    """

    formatter: Any

    def ask(self, asked: Mapping[str, Any]) -> Any:
        """The prompt for an instruction with its input, a plain prompt, or messages."""
        if "instruction" in asked:
            return self.formatter.prompt(asked["instruction"], asked.get("input", ""))
        if "messages" in asked:
            return self.ask_messages(asked["messages"], asked)
        return asked["prompt"]

    def ask_messages(
        self, messages: Sequence[Mapping[str, Any]], beside: Mapping[str, Any] | None = None
    ) -> Any:
        """The prompt for a conversation.

        Raises:
            ConfigError: When the model's template has no place for it.
        """
        from qlora_kit.data import ChatFormatter

        if isinstance(self.formatter, ChatFormatter):
            given = {k: v for k, v in (beside or {}).items() if k not in ("messages", "prompt")}
            return self.formatter.prompt(list(messages), **given)
        if [message["role"] for message in messages] == ["user"]:
            return self.formatter.prompt(messages[0]["content"])
        raise ConfigError(
            f"The model is asked with {type(self.formatter).__name__}, which takes one instruction "
            f"and no conversation of {len(messages)} messages. Give --template chat, if the model "
            "knows its tokenizer's chat template."
        )

    @property
    def takes_conversations(self) -> bool:
        """Whether more than one instruction can be asked at once."""
        from qlora_kit.data import ChatFormatter

        return isinstance(self.formatter, ChatFormatter)


class AskingPlan(NamedTuple):
    """What was given, checked before a model is loaded.

    Attributes:
        plan: The template that was asked for, if one was.
        name: What the model is called, for messages.
    """

    plan: Any
    name: str

    def complete(self, model: Any) -> AskingForm:
        """The form for a model that is loaded."""
        if self.plan is not None:
            return AskingForm(self.plan.make(model.tokenizer))
        if model.record.formatter is not None:
            return AskingForm(model.record.formatter)
        from qlora_kit.data import plan_formatter

        # What the model's makers trained it with, if they did; else the plainest of instructions.
        template = "chat" if model.tokenizer.chat_template else "alpaca"
        sys.stderr.write(
            f"{self.name} does not say how it was trained; asking with --template {template}.\n"
        )
        return AskingForm(plan_formatter(template=template).make(model.tokenizer))


def read_form(options: argparse.Namespace, name: str | None = None) -> AskingPlan:
    """How the options ask.

    Raises:
        ConfigError: When they cannot.
    """
    from qlora_kit.data import plan_formatter

    plan = None
    if options.template is not None:
        plan = plan_formatter(template=options.template, system=options.system)
    elif options.system is not None:
        raise ConfigError(
            "--system goes with --template: what a model was trained with has a system text of "
            "its own."
        )
    return AskingPlan(plan, name or options.model)
