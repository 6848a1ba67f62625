"""An exporter under test: its exports, what may change meanwhile, and what a promise is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from qlora_kit.export.job import ExportJob, Settings
from qlora_kit.handles import AdaptedModel
from qlora_kit.hookspecs import Exporter
from qlora_kit.results import Artifact
from qlora_kit.testing.snapshots import fingerprint_model, snapshot_tree
from qlora_kit.weights.shared_merge import SharedMerge

__all__ = ["Broken", "Contract", "Promise", "hold_to"]


class Broken(Exception):  # noqa: N818 - a finding, not a fault of this code
    """A promise was not kept; says what was seen."""


@dataclasses.dataclass
class Contract:
    """One exporter under test.

    Attributes:
        exporter: The exporter.
        options: The format's options.
        model: What is exported.
        folder: Scratch: ``base``, ``cwd``, ``tmp`` and one folder per export.
        verify: The level that has to notice damage.
        is_deterministic: Whether one model gives the same bytes every time.
        artifacts: What was exported so far, by the name of the folder.
        logged: What was logged during the first export.
    """

    exporter: Exporter
    options: dict[str, Any]
    model: AdaptedModel
    folder: Path
    verify: Literal[True, "full"]
    is_deterministic: bool
    artifacts: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    logged: list[str] = dataclasses.field(default_factory=list)

    @property
    def needs_path(self) -> bool:
        """Whether the format leaves files on this disk."""
        return bool(getattr(self.exporter, "needs_path", True))

    def make_job(self, name: str, exporter: Exporter | None = None, **settings: Any) -> ExportJob:
        """The stage's job for an export into the scratch folder of that name."""
        path = self.folder / name if self.needs_path else None
        given = Settings(SharedMerge(), verify=self.verify, **settings)
        exporter = exporter or self.exporter
        return ExportJob.make(exporter, "under test", self.model, path, self.options, given)

    def export(self, name: str, **settings: Any) -> Artifact:
        """Export as ``export_model`` would."""
        job = self.make_job(name, **settings)
        job.check()
        self.artifacts[name] = job.run()
        return self.artifacts[name]

    @contextmanager
    def watched(self, name: str | None = None) -> Iterator[None]:
        """Nothing but the folder of that name may change, on disk or in the model."""
        tree, model = snapshot_tree(self.folder, name), fingerprint_model(self.model)
        yield
        changed = sorted(set(tree.items()) ^ set(snapshot_tree(self.folder, name).items()))
        if changed:
            raise Broken(f"It touched {', '.join(dict(changed))}.")
        moved = model.items() ^ fingerprint_model(self.model).items()
        if moved:
            raise Broken(f"It changed the model: {', '.join(sorted(dict(moved))[:3])}.")


@dataclasses.dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        sentence: What is promised.
        check: Raises :class:`Broken`.
        is_required: Whether the rest makes no sense without it.
        is_about_files: Whether it does not apply to formats without a path.
    """

    sentence: str
    check: Callable[[Any], None]
    is_required: bool = False
    is_about_files: bool = False

    def applies(self, contract: Any) -> bool:
        """Whether what is under test makes this promise."""
        return not self.is_about_files or contract.needs_path


def hold_to(contract: Any, promises: Iterable[Promise]) -> tuple[list[str], dict[str, str]]:
    """The sentences that were checked, and for each that was broken what was seen."""
    checked: list[str] = []
    broken: dict[str, str] = {}
    for promise in promises:
        if not promise.applies(contract):
            continue
        checked.append(promise.sentence)
        try:
            promise.check(contract)
        except Broken as seen:
            broken[promise.sentence] = str(seen)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's code raises is a finding
            broken[promise.sentence] = f"It raised {type(error).__name__}: {error}"
        if promise.is_required and promise.sentence in broken:
            break
    return checked, broken
