"""What an exporter promises, one function per promise.

Each function raises ``Broken`` with what it saw. They run in the order of
:data:`PROMISES` and later ones use what earlier ones exported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Final

from qlora_kit.artifacts.files import list_files
from qlora_kit.errors import ExportError, UnknownOptionError
from qlora_kit.handles import AdaptedModel
from qlora_kit.hookspecs import Exporter, describe_exporter_faults
from qlora_kit.manifest import MANIFEST_NAME, write_manifest
from qlora_kit.options import build_options, collects_unknown
from qlora_kit.testing.contract import Broken, Contract, Promise
from qlora_kit.testing.damage import DAMAGES, copy_export, find_weight_files
from qlora_kit.testing.tiny_model import shake_adapter

__all__ = ["PROMISES"]

_SECRET_NAME: Final = re.compile(r"(^|_)(token|password|passphrase|secret|api_?key)$")


def _has_the_shape(contract: Contract) -> None:
    faults = describe_exporter_faults(contract.exporter)
    summary = getattr(contract.exporter, "summary", "")
    if isinstance(summary, str) and (not summary.strip() or "\n" in summary):
        faults.append("has a summary that is not one line")
    if faults:
        raise Broken("It " + "; it ".join(faults) + ".")


def _has_good_options(contract: Contract) -> None:
    kind = contract.exporter.options_type
    seen = []
    if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        seen.append(f"{kind.__name__} is not frozen: @dataclass(frozen=True).")
    try:
        typing.get_type_hints(kind)
    except Exception as error:  # noqa: BLE001
        seen.append(f"Its annotations cannot be read, so wrong values pass: {error}.")
    built = build_options(kind, contract.options, owner=contract.exporter.name)
    for field in dataclasses.fields(kind):
        if _SECRET_NAME.search(field.name) and field.repr:
            seen.append(f"{field.name} looks like a secret; declare it with field(repr=False).")
        if field.repr:
            value = getattr(built, field.name)
            if not _is_storable(value):
                seen.append(f"A manifest cannot hold {field.name}={value!r}.")
    if seen:
        raise Broken("\n".join(seen))


def _is_storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_storable(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_storable(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float | Path | Enum)


def _refuses_wrong_options(contract: Contract) -> None:
    kind = contract.exporter.options_type
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    wrong = f"{names[0] if names else 'option'}_"
    asking = dataclasses.replace(contract, options={**contract.options, wrong: 1})
    with contract.watched():
        try:
            asking.make_job("wrong").check()
        except UnknownOptionError as error:
            is_nearest_named = not names or collects_unknown(kind) or repr(names[0]) in str(error)
            if not is_nearest_named:
                raise Broken(f"{wrong}=1 is refused without naming {names[0]!r}.") from error
        else:
            raise Broken(f"{wrong}=1 is accepted.")


def _runs_here(contract: Contract) -> None:
    find_missing = getattr(contract.exporter, "find_missing", None)
    missing = list(find_missing()) if find_missing is not None else []
    if not all(isinstance(phrase, str) for phrase in missing):
        raise Broken(f"find_missing() returned {missing!r}, not phrases.")
    if missing:
        raise Broken(f"It cannot be tested on this machine: {'; '.join(missing)}.")


def _only_looks(contract: Contract) -> None:
    with contract.watched():
        job = contract.make_job("looked")
        job.check()
        estimate = contract.exporter.check(job.request)
    if estimate.disk_bytes < 0:
        raise Broken(f"It estimates {estimate.disk_bytes!r} bytes.")


class _Collector(logging.Handler):
    """Keeps what was logged."""

    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(record.getMessage())


def _exports(contract: Contract) -> None:
    collector = _Collector(contract.logged)
    root = logging.getLogger()
    level = root.level
    root.addHandler(collector)
    # A secret may not be logged at any level.
    root.setLevel(logging.DEBUG)
    try:
        with contract.watched("good"):
            artifact = contract.export("good")
    finally:
        root.setLevel(level)
        root.removeHandler(collector)
    if not artifact.verification.checks:
        raise Broken("verify() returned no check: nothing was compared.")
    unsaid = [check.name for check in artifact.verification.checks if not check.detail.strip()]
    if unsaid:
        raise Broken(f"These checks have no detail: {', '.join(unsaid)}.")


def _lists_its_files(contract: Contract) -> None:
    artifact, folder = contract.artifacts["good"], contract.folder / "good"
    found = {file.name: file for file in list_files(folder, {})}
    listed = {file.name: file for file in artifact.files}
    if not found.keys() - {MANIFEST_NAME}:
        raise Broken("It wrote no file.")
    wrong = [name for name, file in found.items() if listed.get(name) != file]
    if wrong or len(listed) != len(found):
        raise Broken(f"Size or sha256 is not the file's own: {', '.join(wrong)}.")


def _states_facts(contract: Contract) -> None:
    facts = contract.artifacts["good"].facts
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Broken(f"JSON cannot hold what write() returned: {error}.") from error


def _keeps_secrets(contract: Contract) -> None:
    fields = dataclasses.fields(contract.exporter.options_type)
    secrets = {
        field.name: value
        for field in fields
        if not field.repr and isinstance(value := contract.options.get(field.name), str) and value
    }
    artifact = contract.artifacts["good"]
    places = {
        "the manifest": json.dumps(artifact.manifest, ensure_ascii=False),
        "the artifact's repr": repr(artifact),
        "the log": "\n".join(contract.logged),
    }
    if artifact.path is not None:
        for file in artifact.files:
            text = (artifact.path / file.name).read_bytes().decode("utf-8", "ignore")
            places[file.name] = text
    for name, secret in secrets.items():
        for place, text in places.items():
            if secret in text:
                raise Broken(f"The value of {name} is in {place}.")


def _repeats(contract: Contract) -> None:
    again = contract.folder / "again"
    again.mkdir()
    # Only an export is replaced.
    older = "from an older export"
    (again / older).write_text("")
    write_manifest(again, "artifact", {"files": [{"name": older}]})
    job = contract.make_job("again", overwrite=True)
    # Nobody promises that exports share anything.
    job.request = dataclasses.replace(job.request, shared=None)
    job.check()
    contract.artifacts["again"] = artifact = job.run()
    first = {file.name: file.sha256 for file in contract.artifacts["good"].files}
    second = {file.name: file.sha256 for file in artifact.files}
    if first.keys() != second.keys():
        raise Broken(f"Only one of two exports has {', '.join(first.keys() ^ second.keys())}.")
    differing = [name for name in first if first[name] != second[name] and name != MANIFEST_NAME]
    if differing and contract.is_deterministic:
        raise Broken(f"{', '.join(differing)} differ (is_deterministic=False allows it).")


def _follows_the_model(contract: Contract) -> None:
    with _another_adapter(contract.model):
        contract.export("other")
    if not find_weight_files(contract.folder / "good", contract.folder / "other"):
        raise Broken("With another adapter, every file is the same.")


def _notices_damage(contract: Contract) -> None:
    good, other = contract.folder / "good", contract.folder / "other"
    request = contract.make_job("unused").request
    passed = []
    for file in find_weight_files(good, other):
        for what, damage in DAMAGES.items():
            with copy_export(good) as folder:
                damage(folder / file, other / file)
                if _passes(contract.exporter, request, folder):
                    passed.append(f"verify() passed with {file} {what}.")
    if passed:
        raise Broken("\n".join(passed))


class _StoppedError(Exception):
    """Raised on purpose half-way."""


class _Failing:
    """An exporter, with an error after its last file."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exporter, name)

    def write(self, request: Any, folder: Path) -> Any:
        self._exporter.write(request, folder)
        raise _StoppedError


def _leaves_nothing_half_way(contract: Contract) -> None:
    calls = []

    def stop(what: str, done: int, total: int) -> None:
        calls.append(what)
        raise _StoppedError

    failing: Any = _Failing(contract.exporter)
    for reason, job in (
        ("write() failed", contract.make_job("half", failing)),
        ("progress() raised", contract.make_job("half", progress=stop)),
    ):
        with contract.watched("half"):
            job.check()
            with contextlib.suppress(ExportError):
                job.run()
        is_stopped = bool(calls) or job.exporter is failing
        if is_stopped and (contract.folder / "half").exists():
            raise Broken(f"The destination exists although {reason}.")


def _passes(exporter: Exporter, request: Any, folder: Path) -> bool:
    try:
        return exporter.verify(request, folder).passed
    # The stage turns whatever is raised into a failed export.
    except Exception:  # noqa: BLE001
        return False


@contextmanager
def _another_adapter(model: AdaptedModel) -> Iterator[None]:
    import torch

    kept = {
        name: parameter.detach().clone()
        for name, parameter in model.model.named_parameters()
        if parameter.requires_grad
    }
    shake_adapter(model, seed=11)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


#: In the order in which they are checked.
PROMISES: Final = (
    Promise(
        "It has a name, a one-line summary, options and three methods.",
        _has_the_shape,
        is_required=True,
    ),
    Promise(
        "Its options are frozen and storable, and secrets are declared.",
        _has_good_options,
        is_required=True,
    ),
    Promise("find_missing() names what keeps it from running here.", _runs_here, is_required=True),
    Promise("A wrong option is refused before any work.", _refuses_wrong_options),
    Promise("check() estimates the bytes and only looks.", _only_looks, is_required=True),
    Promise(
        "An export passes its own verification and stays in its folder, and the model is as it "
        "was, bit for bit.",
        _exports,
        is_required=True,
    ),
    Promise(
        "The artifact lists every file with its size and sha256.",
        _lists_its_files,
        is_about_files=True,
    ),
    Promise("What write() returns fits into a manifest.", _states_facts),
    Promise("Secrets are in no manifest, file, log or repr.", _keeps_secrets),
    Promise(
        "The same model gives the same files, with nothing shared.", _repeats, is_about_files=True
    ),
    Promise(
        "Another adapter gives other files.",
        _follows_the_model,
        is_required=True,
        is_about_files=True,
    ),
    Promise("verify() fails when the export is damaged.", _notices_damage, is_about_files=True),
    Promise(
        "After an error half-way the destination is absent.",
        _leaves_nothing_half_way,
        is_about_files=True,
    ),
)
