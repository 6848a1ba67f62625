"""Every error a user of qlora_kit can cause, in one tree.

    QloraKitError
    ├── ConfigError (ValueError)                an argument or option is wrong
    │   └── UnknownOptionError (TypeError)      an option of that name does not exist
    ├── ModelNotFoundError (FileNotFoundError)  no model at that path or name
    ├── OfflineError (ConnectionError)          a hub name was given while offline
    ├── UnsupportedModelError (ValueError)      the model is of a kind we refuse to guess about
    ├── MissingDependencyError (ImportError)    an optional package is absent or broken
    ├── DataError (ValueError)                  rows are missing, empty or malformed
    │   └── DataNotFoundError (FileNotFoundError)   no rows at that path or name
    ├── EngineError (RuntimeError)              the chosen engine cannot do what was asked
    ├── TrainingError (RuntimeError)            training stopped for a reason we can name
    ├── PluginError (RuntimeError)              an exporter plugin is broken or clashes
    └── ExportError (RuntimeError)              an export could not be made
        ├── DestinationExistsError (FileExistsError)
        ├── DiskSpaceError (OSError)
        └── VerificationError (ValueError)      what was written is not what was trained

Each class also inherits the builtin people would catch anyway. Messages name
the value that was given and the next step to take, and carry both as data.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Self

from qlora_kit.messages import UNSET, Call, Owner, Setting, join_pieces

__all__ = [
    "ConfigError",
    "DataError",
    "DataNotFoundError",
    "DestinationExistsError",
    "DiskSpaceError",
    "EngineError",
    "ExportError",
    "MissingDependencyError",
    "ModelNotFoundError",
    "OfflineError",
    "PluginError",
    "QloraKitError",
    "TrainingError",
    "UnknownOptionError",
    "UnsupportedModelError",
    "VerificationError",
    "did_you_mean",
    "invalid_value",
]


class QloraKitError(Exception):
    """Base of every error raised on purpose by qlora_kit.

    Args:
        *message: What is wrong: text, and the arguments it names as
            :class:`~qlora_kit.messages.Setting`.
        parameter: The argument that is wrong, where it is one.
        value: What was given for it.
        advice: What to do about it, in pieces too; follows the message after a space.

    Attributes:
        parameter: As given; ``None`` where no single argument is wrong.
        value: As given; :data:`~qlora_kit.messages.UNSET` where there is none.
    """

    def __init__(
        self,
        *message: Any,
        parameter: str | None = None,
        value: Any = UNSET,
        advice: Any = (),
    ) -> None:
        self._message = message
        self._advice = (advice,) if isinstance(advice, str | Setting | Call) else tuple(advice)
        self.parameter = parameter
        self.value = value
        super().__init__(self.render())

    @property
    def advice(self) -> str:
        """What to do about it, as Python writes it; empty where nothing is advised."""
        return join_pieces(self._advice)

    @property
    def pieces(self) -> tuple[Any, ...]:
        """Message and advice: text, settings and calls in order."""
        separator = (" ",) if self._message and self._advice else ()
        return (*self._message, *separator, *self._advice)

    def render(self, spell: Callable[[Setting | Call], str] = str) -> str:
        """The whole text, with arguments and calls written by ``spell``."""
        return join_pieces(self.pieces, spell)

    def after(self, *pieces: Any) -> Self:
        """The same error with something said before it; raise it ``from`` this one."""
        return type(self)(
            *pieces,
            *self._message,
            parameter=self.parameter,
            value=self.value,
            advice=self._advice,
        )


class ConfigError(QloraKitError, ValueError):
    """An argument or option has a value that cannot work."""


class UnknownOptionError(ConfigError, TypeError):
    """An option of that name does not exist; the message names the nearest ones."""


class ModelNotFoundError(QloraKitError, FileNotFoundError):
    """There is no model at the given path or under the given name."""


class OfflineError(QloraKitError, ConnectionError):
    """Something would have to be downloaded, and downloading was not allowed."""


class UnsupportedModelError(QloraKitError, ValueError):
    """The model's architecture, tensors or tokenizer are not ones we handle correctly."""


class MissingDependencyError(QloraKitError, ImportError):
    """An optional package is not installed or cannot run on this machine."""


class DataError(QloraKitError, ValueError):
    """Training rows are missing, empty or malformed."""


class DataNotFoundError(DataError, FileNotFoundError):
    """There are no rows at the given path or under the given name."""


class EngineError(QloraKitError, RuntimeError):
    """The chosen engine cannot do what was asked on this machine."""


class TrainingError(QloraKitError, RuntimeError):
    """Training could not start or go on."""


class PluginError(QloraKitError, RuntimeError):
    """An exporter plugin failed to import, clashes with another or returned nonsense."""


class ExportError(QloraKitError, RuntimeError):
    """An export could not be made; the destination is as it was before."""


class DestinationExistsError(ExportError, FileExistsError):
    """The destination already holds files, and ``overwrite=True`` was not given."""


class DiskSpaceError(ExportError, OSError):
    """The destination's disk is too full for the export."""


class VerificationError(ExportError, ValueError):
    """What was written does not match the model it came from."""


def invalid_value(name: str, expected: str, value: object, of: Owner = "train_sft") -> ConfigError:
    """The error for an argument that is not what it must be.

    Args:
        name: The argument.
        expected: What it must be, such as ``"must be at least 1"``.
        value: What was given.
        of: The function it is an argument of.
    """
    return ConfigError(
        Setting(name, of=of), f" {expected}, got {value!r}.", parameter=name, value=value
    )


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A ``" Did you mean 'x'?"`` suffix for an unknown name, or an empty string."""
    # Whoever types "GGUF" means "gguf".
    spelled = {known_name.casefold(): known_name for known_name in known}
    matches = difflib.get_close_matches(name.casefold(), spelled, n=limit, cutoff=0.6)
    near = [spelled[match] for match in matches]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
