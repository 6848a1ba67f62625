"""How far something has come: a bar in a terminal or notebook, a line now and then elsewhere.

A bar draws itself anew over and over, which fills a file or a pipe with thousands of pieces of one
line.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["open_progress"]

#: Seconds between two lines.
_BETWEEN_LINES: Final = 30.0
_LINE: Final = "{desc} {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"


def open_progress(
    total: int, what: str, unit: str, *, bar: str | None = None, done: int = 0, hidden: bool = False
) -> Any:
    """A tqdm bar, or what looks like one to its caller and writes lines to standard error.

    Args:
        total: How many there are.
        what: What is done.
        unit: What is counted, in the plural.
        bar: tqdm's ``bar_format`` of a drawn bar; its own by default.
        done: How many were done before.
        hidden: Whether to show nothing.
    """
    from tqdm.auto import tqdm

    options: Mapping[str, Any] = {
        "total": total, "desc": what, "unit": unit, "initial": done, "disable": hidden,
    }  # fmt: skip
    is_notebook = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
    if hidden or is_notebook or (sys.stderr is not None and sys.stderr.isatty()):
        return tqdm(**options, bar_format=bar)
    return _make_lines()(
        **options, bar_format=_LINE, mininterval=_BETWEEN_LINES, miniters=1, maxinterval=math.inf
    )


def _make_lines() -> Any:
    from tqdm.std import tqdm

    class Lines(tqdm):  # type: ignore[type-arg]
        """A bar that writes each of its states below the one before."""

        _written = ""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            text = str(self)
            if text != self._written:
                self.fp.write(f"{text}\n")
                self.fp.flush()
                self._written = text

        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            # Lines come at their own pace.
            super().set_postfix_str(s, refresh=False)

        def close(self) -> None:
            if self.disable:
                return
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]
            self.display()

    return Lines
