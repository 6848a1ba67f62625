"""Several formats in one call: everything checked first, one failure loses one.

This module orders jobs and spreads options.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from qlora_kit.errors import (
    ConfigError,
    QloraKitError,
    UnknownOptionError,
    did_you_mean,
    invalid_value,
)
from qlora_kit.export.job import ExportJob, Settings
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import Exporter
from qlora_kit.options import collects_unknown
from qlora_kit.plugins import ExporterRegistry
from qlora_kit.results import Artifact, ExportResults

__all__ = ["Part", "divide", "export_several"]

logger = logging.getLogger(__name__)


def export_several(
    registry: ExporterRegistry,
    model: LoadedModel,
    formats: Sequence[str] | Mapping[str, Mapping[str, Any]],
    path: Path | None,
    options: Mapping[str, Any],
    settings: Settings,
) -> ExportResults:
    """Export every format into a folder of its own.

    Args:
        registry: Where formats are found.
        model: The live model.
        formats: Names, or names with options.
        path: The folder that holds one folder per format.
        options: Options for every format that has them.
        settings: What the exports have in common.

    Raises:
        ConfigError: When a name, an option or a path of any of them is wrong. Nothing is
            written then.
    """
    parts = divide(registry, formats, path, options)
    jobs = [
        ExportJob.make(
            part.exporter,
            registry.get_origin(name),
            model,
            part.path,
            part.options,
            settings,
        )
        for name, part in parts.items()
    ]
    # What others can read back is written first; the result keeps the order asked for.
    jobs.sort(key=lambda job: not getattr(job.exporter, "shares_merge", False))
    artifacts: dict[str, Artifact] = {}
    failures: dict[str, Exception] = {}
    for job in _check_all(jobs, failures):
        try:
            artifacts[job.name] = job.run()
        except QloraKitError as error:
            _report(job, error, failures)
            # An older export may stand where the shared merge was to be.
            if job.request.destination is not None:
                settings.shared.withdraw(job.request.destination)
    return ExportResults(
        {name: artifacts[name] for name in parts if name in artifacts},
        {name: failures[name] for name in parts if name in failures},
    )


class Part(NamedTuple):
    """What one of several formats is asked for."""

    exporter: Exporter
    path: Path | None
    options: Mapping[str, Any]


def divide(
    registry: ExporterRegistry,
    formats: Sequence[str] | Mapping[str, Mapping[str, Any]],
    path: Path | None,
    options: Mapping[str, Any],
) -> dict[str, Part]:
    """Each format by name, with its own folder and the options that it has.

    Raises:
        ConfigError: When there is no format, no such format, no path, or nobody takes an option.
    """
    per_format = _read_formats(formats)
    if not per_format:
        raise ConfigError(f"No format given. Available: {', '.join(registry.names())}.")
    exporters = {name: registry.get(name) for name in per_format}
    if path is None and any(_needs_path(exporter) for exporter in exporters.values()):
        raise ConfigError("Several formats need a path; each goes into a folder of its own there.")
    _spread_options(exporters, per_format, options)
    return {
        name: Part(
            exporter,
            path / name if path is not None and _needs_path(exporter) else None,
            per_format[name],
        )
        for name, exporter in exporters.items()
    }


def _read_formats(formats: object) -> dict[str, dict[str, Any]]:
    if isinstance(formats, Mapping):
        wrong = [name for name, own in formats.items() if not isinstance(own, Mapping)]
        if wrong:
            raise ConfigError(
                f"A mapping of formats gives each its options, such as {{'lora': {{}}}}; "
                f"{wrong[0]!r} has {formats[wrong[0]]!r}."
            )
        return {name: dict(own) for name, own in formats.items()}
    if not isinstance(formats, Sequence):
        raise invalid_value(
            "format",
            "must be a name, a list of names, or a mapping of names to options",
            formats,
            "export_model",
        )
    return {name: {} for name in formats}


def _needs_path(exporter: Exporter) -> bool:
    return bool(getattr(exporter, "needs_path", True))


def _spread_options(
    exporters: Mapping[str, Exporter],
    per_format: dict[str, dict[str, Any]],
    options: Mapping[str, Any],
) -> None:
    """Give every shared option to each format that has it."""
    known = {
        name: [field.name for field in fields(exporter.options_type) if field.init]
        for name, exporter in exporters.items()
    }
    for option, value in options.items():
        takers = [name for name in exporters if option in known[name]] or [
            name for name, exporter in exporters.items() if collects_unknown(exporter.options_type)
        ]
        if not takers:
            everything = sorted({option for names in known.values() for option in names})
            raise UnknownOptionError(
                f"None of the formats {', '.join(exporters)} has an option {option!r}."
                f"{did_you_mean(option, everything)} Their options: "
                f"{', '.join(everything) or 'none'}."
            )
        for name in takers:
            per_format[name].setdefault(option, value)


def _check_all(jobs: list[ExportJob], failures: dict[str, Exception]) -> list[ExportJob]:
    """The jobs that can run, on disks that have to hold all of theirs."""
    passed: list[ExportJob] = []
    for job in jobs:
        try:
            job.check(sum(other.needed_bytes for other in passed if other.device == job.device))
        except QloraKitError as error:
            _report(job, error, failures)
        else:
            passed.append(job)
    return passed


def _report(job: ExportJob, error: QloraKitError, failures: dict[str, Exception]) -> None:
    logger.warning("Export %r failed: %s", job.name, error)
    failures[job.name] = error
