"""One format made out of another: a converter starts from a merged checkpoint.

An exporter that converts, packs or uploads what another exporter writes calls that one
through this module, with options checked and the merges of the whole call shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit import plugins
from qlora_kit.export.job import ExportJob
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest
from qlora_kit.options import build_options
from qlora_kit.results import Artifact, Verification

__all__ = ["NestedExport", "nest_export"]


@dataclasses.dataclass(frozen=True)
class NestedExport:
    """Another format's three steps, for an exporter to call within its own, or all in one.

    Attributes:
        exporter: The other exporter.
        request: What it is asked for; the destination is ``None``, as nothing of it is kept.
        origin: The plugin it comes from, to be named when it fails.
    """

    exporter: Exporter
    request: ExportRequest
    origin: object = None

    def check(self) -> ExportEstimate:
        """See :meth:`qlora_kit.Exporter.check`; call it in your own ``check``."""
        return self.exporter.check(self.request)

    def write(self, folder: Path) -> Mapping[str, Any]:
        """See :meth:`qlora_kit.Exporter.write`.

        Args:
            folder: An existing empty folder, such as one made inside your own staged folder.
        """
        return self.exporter.write(self.request, folder)

    def verify(self, folder: Path) -> Verification:
        """See :meth:`qlora_kit.Exporter.verify`."""
        return self.exporter.verify(self.request, folder)

    def run(self, path: Path) -> Artifact:
        """A whole export as :func:`export_model` makes it: written, verified, with its manifest.

        Args:
            path: Where it will stand: a name that is free, such as one inside your own staged
                folder.

        Raises:
            QloraKitError: When any of it failed. Nothing is left then.
        """
        request = dataclasses.replace(self.request, destination=path)
        job = ExportJob(self.exporter, self.origin, request, overwrite=False)
        job.check()
        return job.run()


def nest_export(request: ExportRequest, name: str, /, **options: Any) -> NestedExport:
    """Prepare another format of the same model.

    Args:
        request: Your own request.
        name: The other format, for example ``"merged_16bit"``.
        **options: Its options.

    Raises:
        ConfigError: When there is no such format, or an option is wrong.
    """
    registry = plugins.get_registry()
    exporter = registry.get(name)
    built = build_options(exporter.options_type, options, owner=name)
    nested = dataclasses.replace(request, options=built, destination=None)
    return NestedExport(exporter, nested, registry.get_origin(name))
