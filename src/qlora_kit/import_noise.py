"""Three messages of other packages that nobody who loads a model can act on.

torch deprecates what torchao does while it is imported, looks for a GPU's compiler before
compiling for a CPU, and bitsandbytes asks for a package that would download kernels this library
does not use. Everything else is shown.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

__all__ = ["drop_noise", "without_noise"]

# Loggers, and what is in the one message of theirs to drop.
_CHATTY: Final = {
    "torch.utils._pytree": "is an Enum subclass and is now natively",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "bitsandbytes.backends.cpu.ops": "kernels-community",
}


def drop_noise() -> None:
    """Drop them until the process ends: for programs."""
    for name in _CHATTY:
        logging.getLogger(name).addFilter(_is_of_use)


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Drop them for a while; logging is left as it was found."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    added = [logger for logger in loggers if _is_of_use not in logger.filters]
    for logger in added:
        logger.addFilter(_is_of_use)
    try:
        yield
    finally:
        for logger in added:
            logger.removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _CHATTY.values())
