"""One format made out of another: a converter starts from a merged checkpoint.

An exporter that converts, packs or uploads what another exporter writes calls that one
through this module, with options checked and merges shared as in a call of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit import plugins
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest
from qlora_kit.options import build_options
from qlora_kit.results import Verification

__all__ = ["NestedExport", "nest_export"]


@dataclasses.dataclass(frozen=True)
class NestedExport:
    """Another format's three steps, for an exporter to call within its own.

    Attributes:
        exporter: The other exporter.
        request: What it is asked for; the destination is ``None``, as nothing of it is kept.
    """

    exporter: Exporter
    request: ExportRequest

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


def nest_export(request: ExportRequest, name: str, /, **options: Any) -> NestedExport:
    """Prepare another format of the same model.

    Args:
        request: Your own request.
        name: The other format, for example ``"merged_16bit"``.
        **options: Its options.

    Raises:
        ConfigError: When there is no such format, or an option is wrong.
    """
    exporter = plugins.get_registry().get(name)
    built = build_options(exporter.options_type, options, owner=name)
    return NestedExport(exporter, dataclasses.replace(request, options=built, destination=None))
