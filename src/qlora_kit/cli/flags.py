"""Which flag sets what: how the command line writes the arguments that messages name.

Messages of the library carry arguments as :class:`~qlora_kit.messages.Setting`, and calls as
:class:`~qlora_kit.messages.Call`; Python's users read ``max_steps=3``, whoever typed a command
reads ``--set max_steps=3``.
"""

from __future__ import annotations

import copy
import json
import logging
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Final

from qlora_kit.cli.arguments import list_arguments
from qlora_kit.errors import QloraKitError
from qlora_kit.messages import UNSET, Call, Owner, Setting

__all__ = ["CALLS", "SETTERS", "SWITCHES", "VALUED", "FlagFormatter", "FlagWriter"]

#: Flags that take a value, by the function that the argument belongs to.
VALUED: Final[Mapping[tuple[Owner, str], str]] = {
    **{(one.of, one.name): one.flag for one in list_arguments() if one.kind != "switch"},
    ("load_quantized", "dtype"): "--dtype",
    ("load_quantized", "engine"): "--engine",
    ("load_quantized", "max_seq_length"): "--max-seq-length",
    ("formatter", "columns"): "--columns",
    ("formatter", "eos_token"): "--eos-token",
    ("formatter", "on_bad_rows"): "--on-bad-rows",
    ("formatter", "system"): "--system",
    ("read_source", "split"): "--split",
    ("train_sft", "eval_dataset"): "--eval-data",
    ("train_sft", "output_dir"): "--output",
    ("generate_stream", "max_new_tokens"): "--max-new-tokens",
}

#: Flags that stand for one value of an argument; under ``UNSET`` for whatever value it has.
SWITCHES: Final[Mapping[tuple[Owner, str], Mapping[Any, str]]] = {
    **{
        (one.of, one.name): {True: one.flag, False: one.flag.replace("--", "--no-", 1)}
        for one in list_arguments()
        if one.kind == "switch"
    },
    ("load_quantized", "load_in_4bit"): {False: "--no-4bit"},
    ("load_quantized", "load_in_8bit"): {True: "--load-in-8bit"},
    ("load_quantized", "local_files_only"): {False: "--download"},
    ("read_source", "local_files_only"): {False: "--download"},
    ("formatter", "response_only"): {True: "--response-only", False: "--no-response-only"},
    ("formatter", "chat_template"): {UNSET: "--template FILE.jinja"},
    ("train_sft", "formatter"): {UNSET: "--template"},
    ("train_sft", "resume_from_checkpoint"): {UNSET: "--resume"},
    ("export_model", "overwrite"): {True: "--overwrite"},
}

#: For each command, the flag that takes what has no flag of its own as ``NAME=VALUE``.
SETTERS: Final[Mapping[str, Mapping[Owner, str]]] = {
    "train": {"train_sft": "--set", "export_model": "--export-option"},
    "generate": {"generate_stream": "--set"},
    "export": {"export_model": "--set"},
}

#: What stands for a call on the command line.
CALLS: Final[Mapping[str, Callable[[str], str]]] = {
    "AlpacaFormatter": lambda _: "--template alpaca",
    "ChatFormatter": lambda _: "--template chat",
    "PromptCompletionFormatter": lambda _: "--template prompt-completion",
    "TextFormatter": lambda _: "--template text",
    "attach_lora": lambda _: "Train one with qlora-kit train first.",
    "train_sft": lambda _: "SFTConfig has",
    "export_model": lambda name: f"qlora-kit export MODEL {name} out",
}


class FlagWriter:
    """Writes settings and calls as flags of one command.

    Args:
        command: Which one.
    """

    def __init__(self, command: str) -> None:
        self._setters = SETTERS.get(command, {})

    def __call__(self, piece: Setting | Call) -> str:
        """The flag that does what a piece of a message says; as Python where there is none."""
        if isinstance(piece, Call):
            write = CALLS.get(piece.name)
            return str(piece) if write is None else write(piece.argument)
        key = (piece.of, piece.name)
        switches = SWITCHES.get(key, {})
        flag = switches.get(_hashable(piece.value), switches.get(UNSET))
        if flag is not None:
            return flag
        if key in VALUED:
            flag = VALUED[key]
            return flag if piece.value is UNSET else f"{flag} {shlex.quote(_write(piece))}"
        setter = self._setters.get(piece.of)
        if setter is None or piece.value is UNSET:
            return str(piece)
        return f"{setter} {shlex.quote(f'{piece.name}={_write(piece)}')}"

    def describe(self, error: BaseException) -> str:
        """An error's text, in flags where it is one of the library's own."""
        return error.render(self) if isinstance(error, QloraKitError) else str(error)


class FlagFormatter(logging.Formatter):
    """A log record's message alone, with the settings among its arguments as flags."""

    def __init__(self, write: FlagWriter) -> None:
        super().__init__("%(message)s")
        self._write = write

    def format(self, record: logging.LogRecord) -> str:
        """The text of one record; other handlers get it as it was."""
        if isinstance(record.args, tuple):
            record = copy.copy(record)
            record.args = tuple(
                self._write(value)
                if isinstance(value, Setting | Call)
                else self._write.describe(value)
                if isinstance(value, QloraKitError)
                else value
                for value in record.args or ()
            )
        return super().format(record)


def _hashable(value: Any) -> Any:
    """The value where a table can be asked for it: 1 is not True."""
    return value if isinstance(value, bool) else None


def _write(piece: Setting) -> str:
    """A value as the command line reads it."""
    value = piece.value
    if value is ...:
        return "..."
    if isinstance(value, str):
        return value
    if piece.name == "columns" and isinstance(value, Mapping):
        return ",".join(f"{role}={column}" for role, column in value.items())
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)
