"""Keeping standard output for the program: what a library prints there becomes log records."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["log_prints_of"]


@contextlib.contextmanager
def log_prints_of(package: str, logger: logging.Logger) -> Iterator[None]:
    """Log what a package's code prints; what anyone else prints passes through.

    Who prints is told by the module that calls ``print``, so that a user's callbacks keep
    standard output also while the package calls them.

    Args:
        package: What the names of its modules begin with, in lower case.
        logger: Gets a record of level INFO for each line.
    """
    # Programs without a console have no standard output.
    if sys.stdout is None:
        yield
        return
    divider = _Divider(sys.stdout, package, logger)
    sys.stdout = divider
    try:
        yield
    finally:
        divider.finish()
        # Dividers of other threads may lie above this one; the last to finish takes all off.
        while isinstance(sys.stdout, _Divider) and sys.stdout.is_finished:
            sys.stdout = sys.stdout.stream


class _Divider:
    """A text stream in front of another one, which sees all but one package's lines."""

    def __init__(self, stream: Any, package: str, logger: logging.Logger) -> None:
        self.stream, self.is_finished = stream, False
        self._package, self._logger, self._line = package, logger, ""

    def write(self, text: str) -> int:
        # print() is no Python frame, so this is the code that called it.
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if self.is_finished or not caller.lower().startswith(self._package):
            return int(self.stream.write(text))
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log(line)
        return len(text)

    def finish(self) -> None:
        self._log(self._line)
        self._line, self.is_finished = "", True

    def _log(self, line: str) -> None:
        if line.strip():
            self._logger.info("%s", line.rstrip())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
