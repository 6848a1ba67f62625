"""One export from its checks to its artifact.

Checks options, destination and disk, calls the exporter's three methods, and moves the
finished folder into place.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from qlora_kit.artifacts.files import describe_file, list_files
from qlora_kit.artifacts.staging import stage_folder
from qlora_kit.device import get_versions
from qlora_kit.errors import (
    DiskSpaceError,
    ExportError,
    PluginError,
    QloraKitError,
    VerificationError,
)
from qlora_kit.export.request import check_request
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest
from qlora_kit.manifest import MANIFEST_NAME, describe_model, read_manifest, write_manifest
from qlora_kit.private_folders import scratch_folder
from qlora_kit.results import Artifact, ArtifactFile, Verification
from qlora_kit.verification.idle_adapter import mention_idle_adapter
from qlora_kit.weights.merge_base import find_changed_file
from qlora_kit.weights.shared_merge import SharedMerge

__all__ = ["ExportJob", "Progress", "Settings", "Verify"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Verify = bool | Literal["full"]

_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Tokenizer, configuration, manifest and file-system blocks, beside what an exporter counts.
_OVERHEAD_BYTES: Final = 32 * 1024 * 1024
#: What exports that leave nothing on this disk are called while they are written.
_TEMPORARY: Final = "export"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every export of one call has in common.

    Attributes:
        shared: What the exports of one call share.
        overwrite: Whether an existing folder is replaced.
        verify: ``False``, ``True`` or ``"full"``.
        progress: Called as ``progress(what, done, total)``.
    """

    shared: SharedMerge
    overwrite: bool = False
    verify: Verify = True
    progress: Progress | None = None


@dataclasses.dataclass
class ExportJob:
    """One export.

    Attributes:
        exporter: Who writes it.
        origin: Whom to name when the exporter fails.
        request: What it is asked for.
        overwrite: Whether an existing folder is replaced.
        needed_bytes: What it will write, known after :meth:`check`.
    """

    exporter: Exporter
    origin: object
    request: ExportRequest
    overwrite: bool
    needed_bytes: int = 0

    @classmethod
    def make(
        cls,
        exporter: Exporter,
        origin: object,
        model: LoadedModel,
        path: str | os.PathLike[str] | None,
        options: Mapping[str, Any],
        settings: Settings,
    ) -> ExportJob:
        """Check everything that can be checked without looking at the model.

        Raises:
            ConfigError: When an option is wrong, or the path is missing, unneeded or unusable.
            DestinationExistsError: When the path holds files and may not be overwritten.
        """
        built, destination = check_request(
            exporter,
            path,
            options,
            overwrite=settings.overwrite,
            protected=_find_base_paths(model),
        )
        request = ExportRequest(model, built, destination, settings.verify, shared=settings.shared)
        if settings.progress is not None:
            request = dataclasses.replace(request, progress=settings.progress)
        return cls(exporter, origin, request, settings.overwrite)

    @property
    def name(self) -> str:
        """The format's name."""
        return self.exporter.name

    @property
    def device(self) -> int:
        """The file system it writes to, as ``st_dev``."""
        return self._existing_parent().stat().st_dev

    def check(self, reserved_bytes: int = 0) -> None:
        """Let the exporter refuse, and see that the disk has room.

        Args:
            reserved_bytes: What other exports will have written there before this one.

        Raises:
            QloraKitError: With what is wrong and what to do instead.
        """
        changed = find_changed_file(self.request.model)
        if changed is not None:
            logger.warning(
                "%s changed since the model was loaded; the base there is not the one in memory.",
                self.request.model.base.path / changed,
            )
        estimate: ExportEstimate = self._call("check", ExportEstimate, self.request)
        with self._explained_errors("returned an unusable estimate"):
            for note in estimate.notes:
                logger.info("%s: %s", self.name, note)
            self.needed_bytes = math.ceil(estimate.disk_bytes) + _OVERHEAD_BYTES
        parent = self._existing_parent()
        free = shutil.disk_usage(parent).free - reserved_bytes
        if free < self.needed_bytes:
            after = " after the formats before it" if reserved_bytes else ""
            raise DiskSpaceError(
                f"Format {self.name!r} needs {_format_size(self.needed_bytes)} in {parent}, which "
                f"has {_format_size(max(free, 0))} free{after}. Free some, or give a path on "
                "another disk."
            )

    def run(self) -> Artifact:
        """Write, verify, and move into place; on any exception nothing is left.

        Raises:
            QloraKitError: When any of it failed.
        """
        started = time.perf_counter()
        with self._folder() as (folder, commit):
            facts = dict(self._call("write", Mapping, self.request, folder))
            verification = Verification("none")
            if self.request.verify:
                verification = self._call("verify", Verification, self.request, folder)
            with self._explained_errors("could not be finished"):
                if self.request.verify:
                    verification = mention_idle_adapter(self.request.model, verification)
                _raise_for_mismatch(self.name, verification)
                facts |= verification.facts
                files = [
                    file
                    for file in list_files(folder, facts.pop("sha256", {}))
                    # One that a nested export left; its own follows.
                    if file.name != MANIFEST_NAME
                ]
                path = write_manifest(
                    folder, "artifact", self._describe(facts, verification, files)
                )
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
        return {
            "format": self.name,
            "origin": str(self.origin),
            **describe_model(self.request.model),
            "training": self.request.model.record.training,
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
            with ExitStack() as stack:
                with self._explained_errors("found no place to write to"):
                    folder = stack.enter_context(scratch_folder(_TEMPORARY))
                yield folder, lambda: None
            return
        with ExitStack() as stack:
            with self._explained_errors("found no place to write to"):
                staged = stack.enter_context(
                    stage_folder(self.request.destination, overwrite=self.overwrite)
                )
            yield staged.folder, staged.commit

    def _existing_parent(self) -> Path:
        if self.request.destination is None:
            return Path(tempfile.gettempdir())
        parent = self.request.destination.parent
        while not parent.exists():
            parent = parent.parent
        return parent

    def _call(self, step: str, expected: type, *args: Any) -> Any:
        with self._explained_errors(f"failed in {step}()"):
            result = getattr(self.exporter, step)(*args)
        if not isinstance(result, expected):
            raise PluginError(
                f"Exporter {self.name!r} ({self.origin}) returned {type(result).__name__} from "
                f"{step}(), not a {expected.__name__}."
            )
        return result

    @contextmanager
    def _explained_errors(self, failure: str) -> Iterator[None]:
        """Whatever a stranger's code raises names its owner, and a full disk what is needed."""
        try:
            yield
        except QloraKitError:
            raise
        except Exception as error:  # a plugin may raise anything
            if not (isinstance(error, OSError) and error.errno in _FULL_DISK):
                raise ExportError(
                    f"Exporter {self.name!r} ({self.origin}) {failure}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            where = self._existing_parent()
            raise DiskSpaceError(
                f"The disk became full while writing {self.name!r}: it needs "
                f"{_format_size(self.needed_bytes)} in {where}, which has "
                f"{_format_size(shutil.disk_usage(where).free)} free now. "
                f"{self.request.destination or 'Nothing'} is as it was before."
            ) from error


def _find_base_paths(model: LoadedModel) -> tuple[Path, ...]:
    """Where the base was read from, and the user's own file where that is a cached copy of it."""
    given = Path(model.base.name_or_path).expanduser()
    return (model.base.path, given) if given.exists() else (model.base.path,)


def _raise_for_mismatch(name: str, verification: Verification) -> None:
    failed = [check for check in verification.checks if not check.passed]
    if failed:
        raise VerificationError(
            f"The {name} export does not match the model in memory, and was removed: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed)
        )


def _format_size(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB" if size >= 1024**3 else f"{size / 1024**2:.1f} MiB"
