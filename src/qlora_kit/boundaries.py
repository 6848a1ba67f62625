"""Where other libraries' exceptions become errors of this one.

Each boundary (a checkpoint's files, an adapter, the trainer, the generating thread) says once
what it tells its user. The cause stays chained, and a bug of this library stays what it is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from qlora_kit.errors import QloraKitError

__all__ = [
    "describe_cause",
    "hide_secrets",
    "is_disk_full",
    "is_foreign",
    "is_out_of_memory",
    "shown_cause",
    "translate_errors",
]

_PACKAGE: Final = __name__.partition(".")[0]
_OUT_OF_MEMORY: Final = (
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
#: What safetensors and torch's writer of archives say, whose errors carry no number.
_DISK_FULL: Final = ("No space left", "os error 28", "PytorchStreamWriter", "inline_container.cc")
_LIBRARIES: Final = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
)


@contextlib.contextmanager
def translate_errors(make_error: Callable[[Exception], QloraKitError]) -> Iterator[None]:
    """Raise what ``make_error`` makes of a library's exception, from that exception.

    Errors of this library pass, and so do exceptions of its own lines and of its users' code.
    """
    try:
        yield
    except QloraKitError:
        raise
    except Exception as error:
        if not is_foreign(error):
            raise
        raise make_error(error) from shown_cause(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk had no room for what was written, as far as the error says so."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or any(one in str(error) for one in _DISK_FULL)


def is_foreign(error: BaseException) -> bool:
    """Whether a library raised this, the system did, or memory ran out.

    Code that is neither a library's nor this package's is its user's, such as a callback that
    the trainer calls: what that raises is not translated.
    """
    if isinstance(error, OSError | RecursionError) or is_out_of_memory(error):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames]
    if not names or names[-1] == _PACKAGE:
        # Compiled libraries have no frame of their own, but classes of their own.
        return type(error).__module__.partition(".")[0] not in ("builtins", _PACKAGE)
    inside = names[names.index(_PACKAGE) :] if _PACKAGE in names else names
    files = [frame.f_code.co_filename for frame, _ in frames[-len(inside) :]]
    return all(
        name == _PACKAGE or file.startswith("<") or _is_library(file)
        for name, file in zip(inside, files, strict=True)
    )


def describe_cause(error: BaseException, *, limit: int = 300) -> str:
    """An exception in one line, its kind in front where its text says little.

    Args:
        error: What was raised.
        limit: Most characters of it.
    """
    text = hide_secrets(" ".join(str(error).split()))
    if not text or isinstance(error, KeyError | AttributeError | TypeError | IndexError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had no memory left."""
    # A CPU's allocator and cuBLAS raise plain RuntimeErrors.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
        )
    )


def hide_secrets(text: str) -> str:
    """A text without hub tokens, and without the credentials that an address may hold."""
    text = re.sub(r"(?<=://)[^/\s@'\"]+@", "(credentials)@", text)
    text = re.sub(
        r"\b(token|password|secret|[\w-]*signature|[\w-]*credential)=[^\s&'\"]+",
        r"\1=(hidden)",
        text,
        flags=re.IGNORECASE,
    )
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "(token)", text)


def shown_cause(error: Exception) -> Exception | None:
    """An exception to raise another one from, unless a traceback of it would show a secret."""
    link: BaseException | None = error
    while link is not None:
        if hide_secrets(str(link)) != str(link):
            return None
        link = link.__cause__ or link.__context__
    return error


def _is_library(file: str) -> bool:
    # Compiled modules name the file that they were built from.
    if file.endswith((".pyx", ".pxi", ".pxd")):
        return True
    path = Path(file).resolve()
    return (
        str(path).startswith(_LIBRARIES)
        or "site-packages" in str(path)
        or any(_holds_installed(folder) for folder in path.parents)
    )


@functools.cache
def _holds_installed(folder: Path) -> bool:
    """Whether packages were installed into a folder (``pip install --target``, for one)."""
    return str(folder) in sys.path and any(folder.glob("*.dist-info"))
