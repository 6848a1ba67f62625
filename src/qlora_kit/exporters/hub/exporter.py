"""``hub``: any other format, pushed to the Hugging Face Hub in one commit.

The format is written, verified and described in a temporary folder by the export stage
itself, and only then sent. Everything arrives in a single commit, so the repository never
holds half a model: files that another sharding left there are removed in the same commit.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qlora_kit.artifacts.model_card import describe_merged, write_merged_card
from qlora_kit.errors import (
    ConfigError,
    MissingDependencyError,
    UnknownOptionError,
    did_you_mean,
)
from qlora_kit.export import NestedExport, get_exporter, nest_export
from qlora_kit.exporters.hub.local_paths import hide_base_paths, hide_paths
from qlora_kit.exporters.hub.session import HubSession
from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest, hookimpl
from qlora_kit.manifest import read_manifest, to_jsonable
from qlora_kit.messages import Setting
from qlora_kit.options import COLLECTS_UNKNOWN
from qlora_kit.results import Check, Verification

__all__ = ["Hub", "HubOptions"]

logger = logging.getLogger(__name__)

_CARD: Final = "README.md"
_INNER: Final = ".export"
#: Weight files whose names depend on how many there are, and the part they have in common.
_SHARD: Final = re.compile(r"(\w+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class HubOptions:
    """Options of ``hub``; every other keyword goes to the format that is pushed.

    Attributes:
        repo_id: ``"name/model"``. The repository is made if it is not there.
        format: What to push: any other format's name.
        private: Who may see it. ``None`` makes a new repository private and leaves an existing
            one as it is; ``True`` refuses to push to a public one.
        token: A token with write access. ``None`` takes what ``hf auth login`` or ``HF_TOKEN``
            left. It appears in no log, manifest or message.
        commit_message: The commit's first line.
        create_pr: Open a pull request instead of committing to the main branch.
        replace_card: Overwrite a ``README.md`` that the repository has already.
        endpoint: Another hub than the one ``HF_ENDPOINT`` names, by default huggingface.co.
        format_options: The format's own options, for names that mean something here too.
    """

    repo_id: str
    format: str = "merged_16bit"
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
    commit_message: str | None = None
    create_pr: bool = False
    replace_card: bool = False
    endpoint: str | None = None
    # What it holds is the other format's to show or to hide.
    format_options: Mapping[str, Any] = field(
        default_factory=dict, repr=False, metadata={COLLECTS_UNKNOWN: True}
    )


class Hub:
    """Writes another format into a temporary folder and pushes it."""

    name = "hub"
    summary = "Any other format, pushed to the Hugging Face Hub in one commit."
    options_type = HubOptions
    needs_path = False

    def find_missing(self) -> list[str]:
        """Whether the hub's client is there."""
        try:
            import huggingface_hub  # noqa: F401
        except ImportError as error:
            return [f"the package huggingface_hub ({error})"]
        return []

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse wrong options, a token the hub does not know, and what the format refuses."""
        missing = self.find_missing()
        if missing:
            raise MissingDependencyError(
                f"Format 'hub' needs {missing[0]}. Install it with: pip install huggingface_hub"
            )
        inner = _prepare(request)
        session = _connect(request.options)
        estimate = inner.check()
        # Last, because everything else can be told without the network.
        account = session.check_token()
        if request.options.private:
            session.check_visibility()
        where = f"pushing {inner.exporter.name} to {session.repo_id} as {account}."
        return ExportEstimate(estimate.disk_bytes, (where, *estimate.notes))

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Export the other format, then push the folder."""
        options = request.options
        inner = _prepare(request)
        # Inside, because an export replaces its folder, and this one nobody else can read.
        artifact = inner.run(folder / _INNER)
        for path in (folder / _INNER).iterdir():
            path.rename(folder / path.name)
        (folder / _INNER).rmdir()
        session = _connect(options)
        was_private = session.open_repository(options.private)
        if options.format.startswith("merged_"):
            # Again, now that it has a name.
            write_merged_card(request.model, folder, options.format, session.repo_id)
        files = hide_paths(request.model, folder, artifact.files)
        remote = session.list_files()
        names = [file.name for file in files]
        if _CARD in remote and not options.replace_card:
            names = [name for name in names if name != _CARD]
        extra = {}
        if _CARD not in remote and _CARD not in names:
            card = describe_merged(request.model, session.repo_id, options.format)
            extra[_CARD] = hide_base_paths(request.model, card).encode()
        commit = session.push(
            folder,
            names,
            extra=extra,
            delete=_find_stale(remote, names),
            message=options.commit_message or f"Upload {options.format} made with qlora_kit",
            create_pr=options.create_pr,
        )
        sizes = {file.name: file.size for file in files}
        session.confirm({name: sizes[name] for name in names}, commit.revision)
        return {
            **artifact.facts,
            "url": commit.url,
            "repo_id": session.repo_id,
            "private": was_private,
            "commit": commit.oid,
            "pushed_files": len(names) + len(extra),
            "kept_card": _CARD in remote and not options.replace_card,
            "format": options.format,
            "format_options": to_jsonable(inner.request.options),
            "sha256": {file.name: file.sha256 for file in files},
        }

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """What the format found before the push; nothing that failed was pushed."""
        found = read_manifest(folder)["verification"]
        return Verification(found["level"], tuple(Check(**check) for check in found["checks"]))


def _prepare(request: ExportRequest) -> NestedExport:
    """The format to push, with its options checked."""
    options = request.options
    if not options.commit_message and options.commit_message is not None:
        raise ConfigError("Format 'hub': commit_message is empty; leave it out for a default.")
    if not getattr(get_exporter(options.format), "needs_path", True):
        raise ConfigError(
            f"Format 'hub' pushes files, and format {options.format!r} writes none.",
            advice=(
                "Give another format, such as ",
                Setting("format", "merged_16bit", "export_model"),
                ".",
            ),
        )
    try:
        return nest_export(request, options.format, **options.format_options)
    except UnknownOptionError as error:
        own = [field.name for field in dataclasses.fields(HubOptions)][:-1]
        near = [did_you_mean(name, own) for name in options.format_options]
        raise UnknownOptionError(
            f"{error} Those of 'hub' itself: {', '.join(own)}.{''.join(near)}"
        ) from None


def _connect(options: HubOptions) -> HubSession:
    return HubSession(options.repo_id, token=options.token, endpoint=options.endpoint)


def _find_stale(remote: list[str], names: list[str]) -> list[str]:
    """Weight files of another sharding: a loader might prefer them to the new ones."""

    def stem_of(name: str) -> str | None:
        match = _SHARD.fullmatch(name)
        return match[1] if match else None

    stems = {stem_of(name) for name in names} - {None}
    return [name for name in remote if stem_of(name) in stems and name not in names]


@hookimpl
def qlora_kit_register_exporters() -> list[Exporter]:
    """Register this format."""
    return [Hub()]
