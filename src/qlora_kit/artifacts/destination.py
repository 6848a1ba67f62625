"""Where an export is to stand: impossible places are refused before any work."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from qlora_kit.artifacts.files import list_foreign
from qlora_kit.artifacts.staging import clean_leftovers
from qlora_kit.errors import ConfigError, DestinationExistsError, QloraKitError
from qlora_kit.messages import Setting
from qlora_kit.paths import trial_folder
from qlora_kit.private_folders import ADDED_BYTES, locked_folder

__all__ = ["check_destination", "resolve_destination"]

#: As long as the names of an export's files get.
_LONG_NAME: Final = "model-00001-of-00100.safetensors.index.json"


def resolve_destination(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a destination as a user gave it.

    Raises:
        ConfigError: When it cannot be a path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(f"path must be the path of a folder, got {path!r}.")
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    # expanduser() does not know the user, or the working directory is gone.
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{os.fspath(path)} cannot be resolved: {error} Give an absolute path."
        ) from error


def check_destination(destination: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """Refuse a destination that cannot or must not be written, before any work.

    What dead runs left there is cleaned up first, see :func:`clean_leftovers`.

    Args:
        destination: Where the folder is to stand.
        overwrite: Whether an existing folder may be replaced.
        protected: Folders that replacing must never remove, such as the base model's.

    Raises:
        DestinationExistsError: When it holds files and ``overwrite`` is off.
        ConfigError: When it is a file or below one, may not be looked at or written to, is the
            working directory, or replacing it would remove more than an export.
    """
    try:
        _check_destination(destination, overwrite=overwrite, protected=protected)
    except QloraKitError:  # some of which are OSErrors too
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            length = len(os.fsencode(destination.name))
            raise ConfigError(
                f"{_shorten(destination)} cannot be written: that is too long (the last name has "
                f"{length} bytes, the path {len(os.fsencode(destination))}; while it is written "
                f"the name has {ADDED_BYTES} more). Give a shorter path."
            ) from error
        raise ConfigError(
            f"{destination} cannot be written: {error}. Give the path of a folder of your own."
        ) from error


def _check_destination(destination: Path, *, overwrite: bool, protected: tuple[Path, ...]) -> None:
    if destination.parent == destination:
        raise ConfigError(f"{destination} is the root of a file system. Give a folder inside it.")
    existing = next(parent for parent in destination.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file, so {destination} cannot be a folder below it.")
    clean_leftovers(destination)
    if destination.is_symlink() and not destination.exists():
        raise ConfigError(f"{destination} is a link to nothing. Remove it or give another path.")
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"{destination} is a file; give the path of a folder.")
    if destination.is_symlink() or os.path.ismount(destination):
        raise ConfigError(
            f"{destination} is a link or a mount point, which cannot be replaced by renaming. "
            "Give the path of a folder inside it."
        )
    has_effective_ids = os.access in os.supports_effective_ids
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=has_effective_ids):
        raise ConfigError(f"You may not write to {existing}. Give a path in a folder of your own.")
    whole = destination.resolve()
    if whole == _find_working_folder():
        raise ConfigError(
            f"{destination} is the working directory, which cannot be replaced under your feet. "
            "Give the path of a folder inside it."
        )
    if not destination.exists() or not any(destination.iterdir()):
        _try_out(destination)
        return
    if not overwrite:
        inside = sorted(entry.name for entry in destination.iterdir())
        raise DestinationExistsError(
            f"{destination} already holds {len(inside)} files or folders "
            f"({', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}).",
            advice=(
                "Give another path, or ",
                Setting("overwrite", True, "export_model"),
                " to replace all of it.",
            ),
        )
    for path in (_find_working_folder(), Path.home(), *protected):
        kept = path and path.resolve()
        if kept and (kept == whole or whole in kept.parents):
            raise ConfigError(
                Setting("overwrite", True, "export_model"),
                f" would remove everything in {destination}, which contains {kept}. Give the path "
                "of a folder of its own.",
                parameter="overwrite",
                value=True,
            )
    if foreign := list_foreign(destination):
        raise DestinationExistsError(
            f"{destination} holds what no export put there: {', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}. ",
            Setting("overwrite", True, "export_model"),
            " replaces exports only.",
            advice="Give another path, or take that away.",
        )
    _try_out(destination)


def _shorten(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}"


def _try_out(destination: Path) -> None:
    """See that a folder beside it can be made and written into, as it will be.

    Only the system knows: what a name may hold, how long it and a path may be, and whether a
    place such as /proc takes files.
    """
    with trial_folder(destination.parent) as parent, locked_folder(parent, destination.name) as one:
        (one / _LONG_NAME).touch()


def _find_working_folder() -> Path | None:
    try:
        return Path.cwd().resolve()
    except FileNotFoundError:  # it was removed
        return None
