"""Where an export is to stand: impossible places are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_kit.artifacts.staging import clean_leftovers
from qlora_kit.errors import ConfigError, DestinationExistsError, QloraKitError
from qlora_kit.messages import Setting

__all__ = ["check_destination", "resolve_destination"]


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


def _find_working_folder() -> Path | None:
    try:
        return Path.cwd().resolve()
    except FileNotFoundError:  # it was removed
        return None
