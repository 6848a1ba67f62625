"""Pieces of a message that Python and the command line write differently.

A message is a sequence of pieces: text, and arguments or calls that its reader is told to use.
``str`` writes them as Python does; whoever faces another kind of reader, such as the command
line, gives :func:`join_pieces` a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["UNSET", "Call", "Owner", "Piece", "Setting", "join_pieces"]


class _Unset:
    """The absence of a value where ``None`` is one."""

    def __repr__(self) -> str:
        return "UNSET"


#: No value; ``None`` is a value that arguments may have.
UNSET: Final = _Unset()

#: What an argument belongs to: a function, or ``formatter`` for every formatter's constructor.
Owner = Literal[
    "load_quantized",
    "attach_lora",
    "formatter",
    "read_source",
    "train_sft",
    "generate_stream",
    "export_model",
    "evaluate",
    "plan_training",
]


@dataclass(frozen=True)
class Setting:
    """An argument that a message names, with or without a value: ``name=value`` in Python.

    Attributes:
        name: The argument.
        value: Its value; ``...`` for one that the reader has to fill in, :data:`UNSET` to name
            the argument alone. A :class:`Call` or a nested piece is written as code.
        of: The function it is an argument of. A format's own options, and the fields of
            ``SFTConfig`` and ``GenerationConfig``, belong to the function that takes them.
        inside: What stands around it in Python where it is not an argument of a function that
            the reader calls anyway: ``"AlpacaFormatter(tokenizer, {})"``.
    """

    name: str
    value: Any = UNSET
    of: Owner = "train_sft"
    inside: str = "{}"

    def __str__(self) -> str:
        if self.value is UNSET:
            written = self.name
        elif self.value is ...:
            written = f"{self.name}=..."
        else:
            value = str(self.value) if isinstance(self.value, Call) else repr(self.value)
            written = f"{self.name}={value}"
        return self.inside.replace("{}", written)


@dataclass(frozen=True)
class Call:
    """A piece of code that a message tells its reader to run.

    Attributes:
        name: What is called, or looked at; by it another kind of reader is told something else.
        code: How Python writes it.
        argument: The one argument that other writings keep, such as a format's name.
    """

    name: str
    code: str
    argument: str = ""

    def __str__(self) -> str:
        return self.code


Piece = str | Setting | Call


def join_pieces(pieces: Iterable[Any], spell: Callable[[Setting | Call], str] = str) -> str:
    """The text of a message.

    Args:
        pieces: Text, settings and calls; anything else is written by ``str``.
        spell: How settings and calls are written.
    """
    return "".join(
        spell(piece) if isinstance(piece, Setting | Call) else str(piece) for piece in pieces
    )
