"""Exporting: one call that writes a format, checks it, and leaves it whole or not at all.

This stage finds exporters and hands them jobs. Exporters write and compare; this package
does not know any of them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

from qlora_kit import plugins, ranks
from qlora_kit.artifacts.destination import resolve_destination
from qlora_kit.errors import ConfigError, invalid_value
from qlora_kit.export.batch import Part, divide, export_several
from qlora_kit.export.job import ExportJob, Progress, Settings, Verify
from qlora_kit.export.nested import NestedExport, nest_export
from qlora_kit.export.request import check_request
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import Exporter
from qlora_kit.manifest import to_jsonable
from qlora_kit.options import describe_option_fields
from qlora_kit.results import Artifact, ExportResults
from qlora_kit.weights.live import check_trained
from qlora_kit.weights.shared_merge import SharedMerge

__all__ = [
    "NestedExport",
    "available_exporters",
    "check_export",
    "describe_exporters",
    "export_model",
    "get_exporter",
    "nest_export",
]

logger = logging.getLogger(__name__)


@overload
def export_model(
    model: LoadedModel, format: str, /, path: str | os.PathLike[str] | None = None, *,
    overwrite: bool = False, verify: Verify = True, progress: Progress | None = None,
    **options: Any,
) -> Artifact: ...  # fmt: skip


@overload
def export_model(
    model: LoadedModel, format: Sequence[str] | Mapping[str, Mapping[str, Any]], /,
    path: str | os.PathLike[str], *,
    overwrite: bool = False, verify: Verify = True, progress: Progress | None = None,
    **options: Any,
) -> ExportResults: ...  # fmt: skip


def export_model(
    model: LoadedModel,
    format: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    /,
    path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    verify: Verify = True,
    progress: Progress | None = None,
    **options: Any,
) -> Artifact | ExportResults:
    """Write a trained model in a format, checked against the model in memory.

    Args:
        model: What ``load_quantized``, ``attach_lora`` or a training left. It is only read.
        format: An exporter's name, see :func:`available_exporters`; or several, which go
            into ``path/<format>`` each and share the merge that ``merged_16bit`` writes: a list,
            or a mapping of names to options. (Positional, so that a format may have an option
            of that name.)
        path: The folder to write. It appears complete or not at all.
        overwrite: Replace an existing export. A folder with anything else in it is refused.
        verify: ``True`` compares what was written with the live model where that is cheap,
            ``"full"`` compares everything, ``False`` nothing.
        progress: Called as ``progress(what, done, total)``.
        **options: The format's own options. Given with several formats, an option goes to
            every one that has it.

    Returns:
        The artifact; for several formats, artifacts by name and what failed (call
        ``raise_for_failures()`` on it, or look at ``failures``).

    Raises:
        ConfigError: When there is no such format, or an option is wrong; for several formats,
            before any of them is written.
        UnsupportedModelError: When something in the model cannot be exported.
        PluginError: When two plugins claim the format, or one returned nonsense.
        DestinationExistsError: When ``path`` holds files and ``overwrite`` is off, or files that no
            export put there.
        DiskSpaceError: When the disk is too full; says how much is needed.
        VerificationError: When what was written is not the model in memory. Nothing is left.
        ExportError: When the exporter failed (names its plugin), or training has diverged.
            Nothing is left.
    """
    if not isinstance(model, LoadedModel):
        raise ConfigError(
            f"export_model takes what load_quantized or attach_lora returned, got "
            f"{type(model).__name__}."
        )
    _check_verify(verify)
    _check_overwrite(overwrite)
    if progress is not None and not callable(progress):
        raise invalid_value(
            "progress", "must be a function of (what, done, total)", progress, "export_model"
        )
    # Of several processes that train together one writes; the others get what it has or its error.
    return ranks.share(
        f"export {format} {path}",
        lambda: _export(model, format, path, Settings(SharedMerge(), overwrite, verify, progress),
                        options),
    )  # fmt: skip


def _export(
    model: LoadedModel,
    format: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str] | None,
    settings: Settings,
    options: Mapping[str, Any],
) -> Artifact | ExportResults:
    check_trained(model.model)
    registry = plugins.get_registry()
    if not isinstance(format, str):
        parent = None if path is None else resolve_destination(path)
        return export_several(registry, model, format, parent, options, settings)
    exporter, origin = registry.get(format), registry.get_origin(format)
    job = ExportJob.make(exporter, origin, model, path, options, settings)
    job.check()
    return job.run()


def check_export(
    format: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    /,
    path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    verify: Verify = True,
    model: LoadedModel | None = None,
    **options: Any,
) -> None:
    """Refuse what no model could be exported to, before there is one: ahead of a training.

    What is missing on this machine is logged, since not every option of a format needs it.

    Args:
        format: As for :func:`export_model`: a name, several, or a mapping of names to options.
        path: As for :func:`export_model`.
        overwrite: As for :func:`export_model`.
        verify: As for :func:`export_model`.
        model: The model that is to be trained, where it is loaded: formats that know which models
            they can hold refuse the others.
        **options: The formats' own options.

    Raises:
        ConfigError: When there is no such format, or an option or a path is wrong.
        UnsupportedModelError: When a format cannot hold the model.
        DestinationExistsError: When a folder to write holds files and ``overwrite`` is off.
    """
    _check_verify(verify)
    _check_overwrite(overwrite)
    registry = plugins.get_registry()
    destination = None if path is None else resolve_destination(path)
    if isinstance(format, str):
        parts = [Part(registry.get(format), destination, options)]
    else:
        parts = list(divide(registry, format, destination, options).values())
    for part in parts:
        built, _ = check_request(part.exporter, part.path, part.options, overwrite=overwrite)
        check_base = getattr(part.exporter, "check_base", None)
        if model is not None and check_base is not None:
            check_base(model, built)
    for part in parts:
        for phrase in _find_missing(part.exporter):
            logger.warning("%s may not run here: missing: %s", part.exporter.name, phrase)


def available_exporters() -> list[str]:
    """Names of every export format that can be asked for, sorted."""
    return plugins.get_registry().names()


def describe_exporters() -> dict[str, list[Any]]:
    """Every export format, where it comes from, and whether it runs on this machine.

    Returns:
        What JSON can hold:

        * ``exporters``: for each, ``name``, ``summary``, ``plugin``, ``distribution``,
            ``version``, ``options`` (``name``, ``type``, ``default`` as a JSON value,
            ``is_required``, ``is_secret``), ``missing`` (what keeps the format from running here,
            one phrase each) and ``is_available``.
        * ``broken``: plugins that cannot be used, and why, one sentence each.
        * ``switched_off``: installed plugins that an environment variable keeps out.
    """
    registry = plugins.get_registry()
    described = []
    for name in registry.names():
        exporter, origin = registry.get(name), registry.get_origin(name)
        missing = _find_missing(exporter)
        described.append(
            {
                "name": name,
                "summary": exporter.summary,
                **dataclasses.asdict(origin),
                "is_available": not missing,
                "missing": missing,
                "options": [
                    to_jsonable(option) for option in describe_option_fields(exporter.options_type)
                ],
            }
        )
    return {
        "exporters": described,
        "broken": [str(plugin) for plugin in registry.broken],
        "switched_off": [str(origin) for origin in registry.switched_off],
    }


def get_exporter(name: str) -> Exporter:
    """The exporter of that name.

    Args:
        name: As in :func:`available_exporters`.

    Raises:
        ConfigError: When no exporter has that name; names the nearest ones, and broken plugins.
        PluginError: When two plugins claim the name.
    """
    return plugins.get_registry().get(name)


def _check_verify(verify: object) -> None:
    if not isinstance(verify, bool) and verify != "full":
        raise invalid_value("verify", "must be True, False or 'full'", verify, "export_model")


def _check_overwrite(overwrite: object) -> None:
    # Any other value would be taken for true, and a folder replaced that was to be kept.
    if not isinstance(overwrite, bool):
        raise invalid_value("overwrite", "must be True or False", overwrite, "export_model")


def _find_missing(exporter: Exporter) -> list[str]:
    find_missing = getattr(exporter, "find_missing", None)
    if find_missing is None:
        return []
    try:
        return [str(phrase) for phrase in find_missing()]
    except Exception as error:  # noqa: BLE001 - a stranger's code; the other formats are listed
        return [f"find_missing() failed: {type(error).__name__}: {error}"]
