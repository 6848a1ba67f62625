"""A thin command line over the same functions: train, generate, export and others.

Arguments become keyword arguments and results become lines; nothing is decided here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

from qlora_kit import ranks
from qlora_kit.cli import commands
from qlora_kit.cli.commands import INTERRUPTED
from qlora_kit.cli.flags import FlagFormatter, FlagWriter
from qlora_kit.cli.parser import parse
from qlora_kit.errors import QloraKitError

__all__ = ["INTERRUPTED", "main", "quiet_dependencies"]

# Loggers, and what is in the one message of theirs to drop.
_CHATTY: Final = {
    "torch.utils._pytree": "is an Enum subclass and is now natively",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "bitsandbytes.backends.cpu.ops": "kernels-community",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 1 after an error that was explained, or 130 after Ctrl-C.
    """
    quiet_dependencies()
    options = parse(arguments)
    write = FlagWriter(options.command)
    handler = logging.StreamHandler()
    handler.setFormatter(FlagFormatter(write))
    handler.addFilter(_is_news)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, handlers=[handler]
    )
    try:
        if getattr(options, "nproc", None) is not None:
            return commands.train_in_processes(
                options, sys.argv[1:] if arguments is None else arguments
            )
        return int(commands.RUN[options.command](options, write) or 0)
    except QloraKitError as error:
        if ranks.was_told(error):
            return 1
        place = ranks.find_place()
        if place.world > 1:
            sys.stderr.write(f"Process {place.rank}: ")
        sys.stderr.write(f"{type(error).__name__}: {write.describe(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as `| head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def quiet_dependencies() -> None:
    """Drop three messages of other packages that nobody who runs this can act on.

    torch deprecates what torchao does while it is imported, looks for a GPU's compiler before
    compiling for a CPU, and bitsandbytes asks for a package that would download kernels this
    library does not use. Everything else is shown. Only for programs: the library itself leaves
    logging to whoever imports it.
    """
    for name in _CHATTY:
        logging.getLogger(name).addFilter(_is_of_use)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says what the command does not print itself."""
    printed = ("qlora_kit.training.run", "%s"), ("qlora_kit.export.job", "Exported ")
    return not any(
        record.name == name and str(record.msg).startswith(start) for name, start in printed
    )


def _is_of_use(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _CHATTY.values())
