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
the value that was given and the next step to take.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
]


class QloraKitError(Exception):
    """Base of every error raised on purpose by qlora_kit."""


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


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A ``" Did you mean 'x'?"`` suffix for an unknown name, or an empty string."""
    # Whoever types "GGUF" means "gguf".
    spelled = {known_name.casefold(): known_name for known_name in known}
    matches = difflib.get_close_matches(name.casefold(), spelled, n=limit, cutoff=0.6)
    near = [spelled[match] for match in matches]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
