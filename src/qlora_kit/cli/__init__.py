"""A thin command line over the same functions: train, generate, export and others.

Arguments become keyword arguments and results become lines; nothing is decided here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from qlora_kit import ranks
from qlora_kit.cli import commands
from qlora_kit.cli.commands import INTERRUPTED
from qlora_kit.cli.flags import FlagFormatter, FlagWriter
from qlora_kit.cli.parser import parse
from qlora_kit.errors import QloraKitError
from qlora_kit.import_noise import drop_noise

__all__ = ["INTERRUPTED", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 1 after an error that was explained, or 130 after Ctrl-C.
    """
    drop_noise()
    options = parse(arguments)
    write = FlagWriter(options.command)
    handler = logging.StreamHandler()
    handler.setFormatter(FlagFormatter(write))
    handler.addFilter(_is_news)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, handlers=[handler]
    )
    try:
        if options.command == "train" and options.nproc is not None:
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


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says what the command does not print itself."""
    printed = ("qlora_kit.training.notices", "%s"), ("qlora_kit.export.job", "Exported ")
    return not any(
        record.name == name and str(record.msg).startswith(start) for name, start in printed
    )
