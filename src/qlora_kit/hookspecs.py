"""The plugin contract: a hook for exporters, one for formatters, and the shape of what they return.

A package adds an export format with one class and one entry point::

    # pyproject.toml
    [project.entry-points.qlora_kit]
    my_format = "my_package"

    # my_package/__init__.py
    import qlora_kit

    @qlora_kit.hookimpl
    def qlora_kit_register_exporters():
        return [MyExporter()]

A formatter is a class with a name, registered in the same way::

    @qlora_kit.hookimpl
    def qlora_kit_register_formatters():
        return [MyFormatter]
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

import pluggy

from qlora_kit.handles import LoadedModel
from qlora_kit.results import Verification

if TYPE_CHECKING:
    from qlora_kit.weights.shared_merge import SharedMerge

__all__ = [
    "PROJECT_NAME",
    "RESERVED_OPTIONS",
    "UNNAMED_FORMATTER",
    "ExportEstimate",
    "ExportRequest",
    "Exporter",
    "FormatterKind",
    "describe_exporter_faults",
    "describe_formatter_faults",
    "hookimpl",
    "hookspec",
    "qlora_kit_register_exporters",
    "qlora_kit_register_formatters",
]

PROJECT_NAME: Final = "qlora_kit"

#: Keywords of ``export_model`` itself, which a format's option cannot be called.
RESERVED_OPTIONS: Final = ("path", "overwrite", "verify", "progress")

#: The name that ``FormatterBase`` has for classes without one.
UNNAMED_FORMATTER: Final = "custom"

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


def _ignore_progress(what: str, done: int, total: int) -> None:
    """Progress nobody asked to see."""


@dataclass(frozen=True)
class ExportRequest:
    """One export, as an exporter sees it.

    Attributes:
        model: The live model, with or without an adapter.
        options: An instance of the exporter's ``options_type``.
        destination: Where the finished folder will stand; exporters write elsewhere,
            into the folder that ``write`` is given.
        verify: ``False``, ``True`` or ``"full"``.
        progress: Called as ``progress(what, done, total)``; never required.
        shared: What the exports of one call share (``weights/shared_merge.py``); may be ``None``.
    """

    model: LoadedModel
    options: Any
    destination: Path | None
    verify: bool | Literal["full"] = True
    progress: Callable[[str, int, int], None] = field(default=_ignore_progress, repr=False)
    shared: SharedMerge | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ExportEstimate:
    """What an export will take, said before any weight is touched.

    Attributes:
        disk_bytes: Bytes it will write, rounded up.
        notes: Things the user should know, one sentence each.
    """

    disk_bytes: int
    notes: tuple[str, ...] = ()


@runtime_checkable
class Exporter(Protocol):
    """A way of writing a trained model.

    The stage around it finds it by ``name``, builds ``options_type`` from the caller's
    keyword arguments, and calls ``check``, ``write`` and ``verify`` in that order. The
    folder given to ``write`` is empty, beside the destination, and renamed into place only
    when everything held; on any exception it is removed.

    Attributes:
        name: What users type, for example ``"merged_16bit"``; lower case, digits, ``_`` or ``-``.
        summary: One line for ``python -m qlora_kit exporters``.
        options_type: A frozen dataclass; its fields are the format's options. Values are
            checked against their annotations before anything else happens. A field declared
            with ``repr=False`` is a secret: it is left out of manifests and messages.

    Four more attributes are optional:

    * ``needs_path`` (default true): false for a format that leaves nothing on this disk.
    * ``shares_merge`` (default false): true for a format whose merged tensors others of the same
      call may read back; it is written first.
    * ``check_base(model, options)``: refuses a model that no training makes an export of, before
      it is trained; called by ``check_export`` where a model is given, as by the pipeline.
    * ``find_missing()``: what keeps the format from running on this machine, one phrase each,
      without a model; shown by ``python -m qlora_kit exporters``.

    What ``write`` returns becomes the artifact's facts, but for the key ``"sha256"``, a mapping of
    file names to hashes it computed while writing (saves reading the files again). The key
    ``"url"`` says where the export was published.

    ``qlora_kit.testing.check_exporter`` tests all of this; ``docs/plugins.md`` explains it.
    """

    name: str
    summary: str

    @property
    def options_type(self) -> type:
        """The dataclass of the format's options; a plain class attribute will do."""
        ...

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse what cannot work, before any weight is touched.

        Raises:
            QloraKitError: With what is wrong and what to do instead.
        """
        ...

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Write every file of the export into ``folder`` and return facts for the manifest."""
        ...

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Compare what ``write`` left in ``folder`` with the live model."""
        ...


class FormatterKind(Protocol):
    """A class of formatters that can be made again from what a manifest keeps of one.

    A subclass of :class:`~qlora_kit.FormatterBase` with a ``name`` of its own is one; a class of
    another origin needs ``from_spec`` and the members of :class:`~qlora_kit.Formatter`.
    ``qlora_kit.testing.check_formatter`` tests it.

    Attributes:
        name: The ``kind`` that its ``template_spec()`` states, and what ``--template`` calls it;
            lower case, digits, ``_`` or ``-``.
    """

    name: str

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: Any) -> Any:
        """The formatter whose ``template_spec()`` this was."""
        ...


@hookspec
def qlora_kit_register_exporters() -> Iterable[Exporter]:  # type: ignore[empty-body]
    """Return the exporters this plugin adds; called once per process, on first use."""


@hookspec
def qlora_kit_register_formatters() -> Iterable[type[FormatterKind]]:  # type: ignore[empty-body]
    """Return the classes of formatters this plugin adds; called once per process, on first use."""


def describe_exporter_faults(exporter: Any) -> list[str]:
    """What keeps an object from being an exporter, one phrase each; empty when nothing does."""
    if inspect.isclass(exporter):
        return ["is a class; the hook returns instances"]
    faults = []
    name = _read(exporter, "name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        faults.append(f"has no usable name (got {name!r}; lower case, digits, '_' and '-')")
    if not isinstance(_read(exporter, "summary"), str):
        faults.append("has no summary")
    options_type = _read(exporter, "options_type")
    if not (isinstance(options_type, type) and is_dataclass(options_type)):
        faults.append("has no options_type that is a dataclass")
    else:
        taken = sorted({field.name for field in fields(options_type)} & set(RESERVED_OPTIONS))
        faults.extend(f"has an option {name!r}, which is export_model's own" for name in taken)
    faults.extend(
        f"has no method {method}()"
        for method in ("check", "write", "verify")
        if not callable(_read(exporter, method))
    )
    return faults


def describe_formatter_faults(kind: Any) -> list[str]:
    """What keeps an object from being a formatter's class, one phrase each."""
    if not inspect.isclass(kind):
        return ["is not a class; the hook returns classes, which get their tokenizer later"]
    faults = []
    name = _read(kind, "name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        faults.append(f"has no usable name (got {name!r}; lower case, digits, '_' and '-')")
    elif name == UNNAMED_FORMATTER:
        faults.append("has no name of its own")
    faults.extend(
        f"has no method {method}()"
        for method in ("from_spec", "load", "encode", "prompt", "template_spec")
        if not callable(_read(kind, method))
    )
    return faults


def _read(exporter: Any, attribute: str) -> Any:
    try:
        return getattr(exporter, attribute, None)
    except Exception:  # noqa: BLE001 - a property of a stranger's class
        return None
