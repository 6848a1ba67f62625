"""What a format is asked for, checked as far as that takes no model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.artifacts.destination import check_destination, resolve_destination
from qlora_kit.errors import ConfigError
from qlora_kit.hookspecs import Exporter
from qlora_kit.messages import Call
from qlora_kit.options import build_options

__all__ = ["check_request"]


def check_request(
    exporter: Exporter,
    path: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
    *,
    overwrite: bool,
    protected: tuple[Path, ...] = (),
) -> tuple[Any, Path | None]:
    """What a format is asked for, as far as no model is needed to know that it can work.

    Args:
        exporter: Who is to write.
        path: The folder to write.
        options: Keyword arguments.
        overwrite: Whether an existing folder may be replaced.
        protected: Folders that replacing must never remove.

    Returns:
        The options as the exporter takes them, and the absolute path.

    Raises:
        ConfigError: When an option is wrong, or the path is missing, unneeded or unusable.
        DestinationExistsError: When the path holds files and may not be overwritten.
    """
    name = exporter.name
    built = build_options(exporter.options_type, options, owner=name)
    destination = None if path is None else resolve_destination(path)
    needs_path = getattr(exporter, "needs_path", True)
    if needs_path and destination is None:
        raise ConfigError(
            f"Format {name!r} needs a path: ",
            Call("export_model", f"export_model(model, {name!r}, 'out')", name),
            ".",
            parameter="path",
            value=path,
        )
    if not needs_path and destination is not None:
        raise ConfigError(f"Format {name!r} leaves nothing on this disk and takes no path.")
    if destination is not None:
        check_destination(destination, overwrite=overwrite, protected=protected)
    return built, destination
