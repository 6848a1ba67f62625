"""What the library says in Python, said in flags.

Messages of the library name keyword arguments, since that is how most people call it. Here is
the one place that knows which flag each of them is on the command line.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

__all__ = ["EXPORTING", "FLAGS", "PHRASES", "Spelling", "SpellingFormatter"]

#: Keywords with a flag of their own. A flag that stands for one value only is named with it.
FLAGS: Final[Mapping[str, str]] = {
    "columns": "--columns",
    "dtype": "--dtype",
    "engine": "--engine",
    "eos_token": "--eos-token",
    "eval_dataset": "--eval-data",
    "load_in_4bit=False": "--no-4bit",
    "load_in_8bit=True": "--load-in-8bit",
    "local_files_only=False": "--download",
    "lora_alpha": "--lora-alpha",
    "max_new_tokens": "--max-new-tokens",
    "max_seq_length": "--max-seq-length",
    "on_bad_rows": "--on-bad-rows",
    "output_dir": "--output",
    "overwrite=True": "--overwrite",
    "packing=True": "--packing",
    "response_only=False": "--no-response-only",
    "response_only=True": "--response-only",
    "resume_from_checkpoint": "--resume",
    "split": "--split",
    "system": "--system",
}
#: Those that mean the same while exporting, where a format may have an option ``dtype``.
EXPORTING: Final[Mapping[str, str]] = {"overwrite=True": "--overwrite"}

#: What takes no value.
_SWITCHES: Final = ("--resume",)

#: Advice that is more than one keyword, as a pattern, and what to do instead.
PHRASES: Final[Mapping[str, str]] = {
    r"AlpacaFormatter\(tokenizer, (response_only=True|eos_token=\.\.\.|columns=\.\.\.)\)": r"\1",
    r"ChatFormatter\(tokenizer, chat_template=\.\.\.\)": "--template FILE.jinja",
    r"ChatFormatter\(tokenizer\)": "--template chat",
    r"use AlpacaFormatter\b": "use --template alpaca",
    r"export_model\(model, '([\w-]+)', 'out'\)": r"qlora-kit export MODEL \1 out",
    r"Use attach_lora first": "Train one with qlora-kit train first",
    r"give eval_dataset\b": "give --eval-data",
    r"without resume_from_checkpoint\b": "without --resume",
    r"To train on it: dataset\.select_columns\(\['text'\]\)": "To train on it: --template text",
    r"To keep it: formatter=model\.record\.formatter": "To keep it: --template",
    r"train_sft and SFTConfig have no": "SFTConfig has no",
}

_VALUE: Final = (
    r"\{[^{}]*\}|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|\.\.\.|True\b|False\b|None\b|"
    r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
)
_ASSIGNMENT: Final = re.compile(rf"(?<![\w.=/'\"-])([a-z]\w*)=({_VALUE})")


class Spelling:
    """Rewrites a message for whoever typed the command.

    Attributes:
        flags: Keywords with a flag of their own, as in :data:`FLAGS`.
        setter: The flag that takes every other keyword as ``NAME=VALUE``.
        get_settings: Which keywords those are. Asked late: the libraries that define them are
            loaded when a message can be about them.
    """

    def __init__(self) -> None:
        self.use(FLAGS)

    def use(
        self,
        flags: Mapping[str, str],
        setter: str = "--set",
        get_settings: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """Spell like this from now on."""
        self.flags, self.setter, self.get_settings = flags, setter, get_settings

    def __call__(self, text: str) -> str:
        """The message with every keyword argument as the flag that sets it."""
        for pattern, instead in PHRASES.items():
            text = re.sub(pattern, instead, text)
        return _ASSIGNMENT.sub(self._spell, text)

    def _spell(self, match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = self.flags.get(f"{name}={value}")
        if flag is not None:
            return flag
        flag = self.flags.get(name)
        if flag is not None:
            return flag if flag in _SWITCHES else f"{flag} {shlex.quote(_write(value, name))}"
        if name in self.get_settings():
            return f"{self.setter} {shlex.quote(f'{name}={_write(value, name)}')}"
        return match[0]


def _write(value: str, name: str) -> str:
    """A Python value as the command line reads it."""
    try:
        read: Any = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if isinstance(read, str):
        return read
    if name == "columns" and isinstance(read, dict):
        return ",".join(f"{key}={item}" for key, item in read.items())
    return value if read is ... else json.dumps(read)


class SpellingFormatter(logging.Formatter):
    """The message alone; the library's own in flags."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__("%(message)s")
        self._spelling = spelling

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The text of one record, without its traceback."""
        text = super().formatMessage(record)
        return self._spelling(text) if record.name.startswith("qlora_kit") else text
