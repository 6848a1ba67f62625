"""Exporting: one call that writes a format, checks it, and leaves it whole or not at all.

This stage finds the exporter, checks options, destination and disk, and moves the finished
folder into place. Exporters write and compare; this module does not know any of them.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, overload

from qlora_kit import plugins
from qlora_kit.checkpoint.files import describe_file, list_files
from qlora_kit.checkpoint.staging import check_destination, stage_folder
from qlora_kit.device import get_versions
from qlora_kit.errors import (
    ConfigError,
    DiskSpaceError,
    ExportError,
    PluginError,
    QloraKitError,
    VerificationError,
)
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest
from qlora_kit.manifest import MANIFEST_NAME, describe_model, read_manifest, write_manifest
from qlora_kit.options import build_options
from qlora_kit.results import Artifact, ArtifactFile, ExportResults, LoadedModel, Verification
from qlora_kit.weights.sharing import SharedMerge

__all__ = ["available_exporters", "export_model", "get_exporter"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Verify = bool | Literal["full"]

_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Tokenizer, configuration, manifest and file-system blocks, beside what an exporter counts.
_OVERHEAD_BYTES: Final = 32 * 1024 * 1024


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
        format: An exporter's name, see :func:`available_exporters`; or several, which share
            one merge and go into ``path/<format>`` each: a list, or a mapping of names to
            options. (Positional, so that a format may have an option of that name.)
        path: The folder to write. It appears complete or not at all.
        overwrite: Replace an existing folder, all of it.
        verify: ``True`` compares what was written with the live model where that is cheap,
            ``"full"`` compares everything, ``False`` nothing.
        progress: Called as ``progress(what, done, total)``.
        **options: The format's own options. Given with several formats, an option goes to
            every one that has it.

    Returns:
        The artifact; for several formats, artifacts by name and what failed.

    Raises:
        ConfigError: When there is no such format, or an option is wrong.
        DestinationExistsError: When ``path`` holds files and ``overwrite`` is off.
        DiskSpaceError: When the disk is too full; says how much is needed.
        VerificationError: When what was written is not the model in memory. Nothing is left.
        ExportError: When the exporter failed. Nothing is left.
    """
    if not isinstance(model, LoadedModel):
        raise ConfigError(
            f"export_model takes what load_quantized or attach_lora returned, got "
            f"{type(model).__name__}."
        )
    if verify not in (True, False, "full"):
        raise ConfigError(f"verify must be True, False or 'full', got {verify!r}.")
    shared = SharedMerge()
    if isinstance(format, str):
        job = _Job.make(model, format, options, path, overwrite, verify, progress, shared)
        job.check()
        return job.run()
    return _export_several(model, format, path, options, overwrite, verify, progress, shared)


def available_exporters() -> list[str]:
    """Names of every export format that can be asked for, sorted.

    Raises:
        PluginError: When two plugins register one name.
    """
    return plugins.get_registry().names()


def get_exporter(name: str) -> Exporter:
    """The exporter of that name.

    Args:
        name: As in :func:`available_exporters`.

    Raises:
        ConfigError: When there is none; names the nearest, and plugins that are broken.
    """
    return plugins.get_registry().get(name)


def _export_several(
    model: LoadedModel,
    formats: Sequence[str] | Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
    overwrite: bool,
    verify: Verify,
    progress: Progress | None,
    shared: SharedMerge,
) -> ExportResults:
    per_format = (
        {name: dict(own) for name, own in formats.items()}
        if isinstance(formats, Mapping)
        else {name: {} for name in formats}
    )
    if not per_format:
        raise ConfigError(f"No format given. Available: {', '.join(available_exporters())}.")
    if path is None:
        raise ConfigError("Several formats need a path; each goes into a folder of its own there.")
    _spread_options(per_format, options)
    jobs = [
        _Job.make(model, name, own, Path(path) / name, overwrite, verify, progress, shared)
        for name, own in per_format.items()
    ]
    # What others can read back is written first; the result keeps the order asked for.
    jobs.sort(key=lambda job: not getattr(job.exporter, "shares_merge", False))
    artifacts: dict[str, Artifact] = {}
    failures: dict[str, Exception] = {}
    for job in jobs:
        try:
            job.check()
            artifacts[job.name] = job.run()
        except QloraKitError as error:
            logger.warning("Export %r failed: %s", job.name, error)
            failures[job.name] = error
    order = list(per_format)
    return ExportResults(
        {name: artifacts[name] for name in order if name in artifacts},
        {name: failures[name] for name in order if name in failures},
    )


def _spread_options(per_format: dict[str, dict[str, Any]], options: Mapping[str, Any]) -> None:
    """Give every shared option to each format that has it."""
    for option, value in options.items():
        takers = [
            name
            for name in per_format
            if option in {f.name for f in dataclasses.fields(get_exporter(name).options_type)}
        ]
        if not takers:
            build_options(
                get_exporter(next(iter(per_format))).options_type,
                {option: value},
                owner=next(iter(per_format)),
            )
        for name in takers:
            per_format[name].setdefault(option, value)


@dataclasses.dataclass
class _Job:
    """One export from its checks to its artifact."""

    exporter: Exporter
    request: ExportRequest
    overwrite: bool
    needed_bytes: int = 0

    @classmethod
    def make(
        cls,
        model: LoadedModel,
        name: str,
        options: Mapping[str, Any],
        path: str | os.PathLike[str] | None,
        overwrite: bool,
        verify: Verify,
        progress: Progress | None,
        shared: SharedMerge,
    ) -> _Job:
        exporter = get_exporter(name)
        built = build_options(exporter.options_type, options, owner=name)
        destination = None if path is None else Path(os.path.abspath(Path(path).expanduser()))
        needs_path = getattr(exporter, "needs_path", True)
        if needs_path and destination is None:
            raise ConfigError(
                f"Format {name!r} needs a path: export_model(model, {name!r}, 'out')."
            )
        if not needs_path and destination is not None:
            raise ConfigError(f"Format {name!r} leaves nothing on this disk and takes no path.")
        if destination is not None:
            check_destination(destination, overwrite=overwrite, protected=(model.base.path,))
        request = ExportRequest(model, built, destination, verify, shared=shared)
        if progress is not None:
            request = dataclasses.replace(request, progress=progress)
        return cls(exporter, request, overwrite)

    @property
    def name(self) -> str:
        return self.exporter.name

    def check(self) -> None:
        estimate: ExportEstimate = self._call("check", ExportEstimate, self.request)
        for note in estimate.notes:
            logger.info("%s: %s", self.name, note)
        self.needed_bytes = estimate.disk_bytes + _OVERHEAD_BYTES
        parent = self._existing_parent()
        free = shutil.disk_usage(parent).free
        if free < self.needed_bytes:
            raise DiskSpaceError(
                f"Format {self.name!r} needs {_format_size(self.needed_bytes)} in {parent}, which "
                f"has {_format_size(free)} free. Free some, or give a path on another disk."
            )

    def run(self) -> Artifact:
        started = time.perf_counter()
        with self._folder() as (folder, commit):
            with self._disk_errors():
                facts = dict(self._call("write", Mapping, self.request, folder))
            known_sha256 = facts.pop("sha256", {})
            verification: Verification = Verification("none")
            if self.request.verify:
                verification = self._call("verify", Verification, self.request, folder)
            facts |= verification.facts
            if not verification.passed:
                failed = [check for check in verification.checks if not check.passed]
                raise VerificationError(
                    f"The {self.name} export does not match the model in memory, and was removed: "
                    + "; ".join(f"{check.name}: {check.detail}" for check in failed)
                )
            with self._disk_errors():
                files = [
                    file
                    for file in list_files(folder, known_sha256)
                    # One that a nested export left; its own follows.
                    if file.name != MANIFEST_NAME
                ]
                content = self._describe(facts, verification, files)
                path = write_manifest(folder, "artifact", content)
                files.append(describe_file(path, folder))
                manifest = read_manifest(folder)
                commit()
        artifact = Artifact(
            format=self.name,
            path=self.request.destination,
            files=tuple(sorted(files, key=lambda file: file.name)),
            verification=verification,
            facts=facts,
            manifest=manifest,
            seconds=time.perf_counter() - started,
            url=facts.get("url"),
        )
        logger.info(
            "Exported %s to %s: %s in %.1f s",
            self.name, artifact.path or artifact.url, _format_size(artifact.size), artifact.seconds,
        )  # fmt: skip
        return artifact

    def _describe(
        self, facts: Mapping[str, Any], verification: Verification, files: list[ArtifactFile]
    ) -> dict[str, Any]:
        """What the manifest says about this export."""
        training = self.request.model.record.training
        return {
            "format": self.name,
            "origin": plugins.get_registry().describe_origin(self.name),
            **describe_model(self.request.model),
            "training": training,
            "options": self.request.options,
            "facts": facts,
            "verification": {
                "level": verification.level,
                "passed": verification.passed,
                "checks": verification.checks,
            },
            "versions": get_versions(),
            "files": files,
        }

    @contextmanager
    def _folder(self) -> Iterator[tuple[Path, Callable[[], None]]]:
        if self.request.destination is None:
            with tempfile.TemporaryDirectory(prefix="qlora_kit-") as folder:
                yield Path(folder), lambda: None
            return
        with stage_folder(self.request.destination, overwrite=self.overwrite) as staged:
            yield staged.folder, staged.commit

    def _existing_parent(self) -> Path:
        if self.request.destination is None:
            return Path(tempfile.gettempdir())
        parent = self.request.destination.parent
        while not parent.exists():
            parent = parent.parent
        return parent

    def _call(self, step: str, expected: type, *args: Any) -> Any:
        """Run a step of the exporter; whatever a stranger's code raises names its owner."""
        origin = plugins.get_registry().describe_origin(self.name)
        try:
            result = getattr(self.exporter, step)(*args)
        except (QloraKitError, OSError):
            raise
        except Exception as error:  # a plugin may raise anything
            raise ExportError(
                f"Exporter {self.name!r} ({origin}) failed in {step}(): "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(result, expected):
            raise PluginError(
                f"Exporter {self.name!r} ({origin}) returned {type(result).__name__} from "
                f"{step}(), not a {expected.__name__}."
            )
        return result

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except QloraKitError:
            raise
        except OSError as error:
            where = self._existing_parent()
            if error.errno in _FULL_DISK:
                raise DiskSpaceError(
                    f"The disk became full while writing {self.name!r}: it needs "
                    f"{_format_size(self.needed_bytes)} in {where}, which has "
                    f"{_format_size(shutil.disk_usage(where).free)} free now. "
                    f"{self.request.destination or 'Nothing'} is as it was before."
                ) from error
            raise ExportError(f"Writing {self.name!r} failed: {error}") from error


def _format_size(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB" if size >= 1024**3 else f"{size / 1024**2:.1f} MiB"
