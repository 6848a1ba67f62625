"""Looking at this machine: what works, what does not, and what to do about it.

Everything is tried rather than looked up where trying takes no more than a moment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Final, Literal

from qlora_kit.errors import QloraKitError
from qlora_kit.paths import get_cache_folder
from qlora_kit.private_folders import PARTIAL, find_left, is_abandoned
from qlora_kit.versions import read_tested

__all__ = ["Finding", "diagnose"]

State = Literal["ok", "note", "problem"]

_GIB: Final = 1024**3

#: Leftovers that are named one by one.
_SHOWN: Final = 3

#: Libraries whose version is told beside the tested one.
_LIBRARIES: Final = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: ``"ok"``, ``"note"`` for what works in another way than usual, or ``"problem"``.
        detail: What was found.
        advice: What to do; empty where there is nothing.
    """

    name: str
    state: State
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        sign = {"ok": "ok", "note": "--", "problem": "!!"}[self.state]
        advice = f"\n{'':18}-> {self.advice}" if self.advice else ""
        return f"{sign}  {self.name:<14}{self.detail}{advice}"


def diagnose(*, network: bool = False) -> list[Finding]:
    """Look at Python, the device, the libraries, the compiler, folders, and the hub if asked.

    Args:
        network: Whether to ask the hub for an answer; without it nothing leaves the machine.

    Returns:
        The findings, in the order in which one builds on the other.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _look_at_python, _look_at_versions, _look_at_device, _look_at_quantization,
        _look_at_compiler, _look_at_exports, _look_at_folders, _look_at_leftovers,
    ]  # fmt: skip
    if network:
        checks.append(_look_at_hub)
    return [finding for check in checks for finding in check()]


def _look_at_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_fit = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if is_fit else "Use Python 3.11 to 3.13, which the tests run with."
    yield Finding("python", "ok" if is_fit else "note", f"{version}, {sys.platform}", advice)


def _look_at_versions() -> Iterator[Finding]:
    known = read_tested()
    for name in _LIBRARIES:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "problem", "not installed", f"pip install {name}")
            continue
        tested = known.get(name, found)
        same = _minor(found) == _minor(tested)
        advice = "" if same else f"If something fails, try the tested one: {name}=={tested}."
        detail = found if same else f"{found}, tested with {tested}"
        yield Finding(name, "ok" if same else "note", detail, advice)


def _minor(version: str) -> list[str]:
    return version.partition("+")[0].split(".")[:2]


def _look_at_device() -> Iterator[Finding]:
    import torch

    from qlora_kit.device import (
        choose_compute_dtype,
        get_device,
        get_device_name,
        measure_free_bytes,
    )

    device = get_device()
    free = measure_free_bytes(device) / _GIB
    dtype = choose_compute_dtype(None, device)
    detail = f"{get_device_name(device)}, {free:.1f} GiB free, computes in {dtype}"
    if device.type != "cpu":
        yield Finding("device", "ok", detail)
        return
    advice = "A model of a few hundred million parameters trains here, several billions do not."
    if shutil.which("nvidia-smi") is not None:
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        advice = (
            f"There is an NVIDIA driver, and torch was built {built} and sees no card: compare "
            "nvidia-smi's CUDA version, and reinstall torch for it (pytorch.org)."
        )
    yield Finding("device", "note", detail, advice)


def _look_at_quantization() -> Iterator[Finding]:
    from qlora_kit.device import get_device
    from qlora_kit.engines.quantization import check_bitsandbytes

    try:
        check_bitsandbytes(get_device(), "nf4")
    except QloraKitError as error:
        yield Finding("4 bits", "problem", str(error))
        return
    yield Finding("4 bits", "ok", "bitsandbytes quantized and read back numbers on the device")


def _look_at_compiler() -> Iterator[Finding]:
    from qlora_kit.device import get_device

    is_gpu = get_device().type == "cuda"
    compilers = [shutil.which(name) for name in ("g++", "clang++", "cl")]
    compiler = next((found for found in compilers if found), "")
    slow = "Steps work without it, more slowly."
    if compiler:
        yield Finding("compiler", "ok", compiler)
    else:
        yield Finding(
            "compiler", "note", "no C++ compiler was found, so layers are not compiled",
            f"apt install g++, or Visual Studio's build tools. {slow}",
        )  # fmt: skip
    if util.find_spec("triton") is not None:
        yield Finding("triton", "ok", metadata.version("triton"))
    elif is_gpu:
        yield Finding("triton", "note", "not installed", f"pip install triton. {slow}")


def _look_at_exports() -> Iterator[Finding]:
    from qlora_kit.export import describe_exporters

    described = describe_exporters()
    for exporter in described["exporters"]:
        missing = "; ".join(exporter["missing"])
        if missing:
            yield Finding(f"{exporter['name']}", "note", f"does not run here: {missing}")
    ready = [one["name"] for one in described["exporters"] if one["is_available"]]
    yield Finding("exports", "ok", f"ready: {', '.join(ready)}")
    for broken in described["broken"]:
        yield Finding("plugin", "problem", str(broken), "Update or uninstall it.")


def _look_at_folders() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, folder in (
        ("cache", get_cache_folder()),
        ("hub cache", Path(constants.HF_HUB_CACHE)),
        ("here", Path.cwd()),
    ):
        existing = folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        free = shutil.disk_usage(existing).free / _GIB
        if not os.access(existing, os.W_OK):
            advice = "Choose another folder (QLORA_KIT_CACHE, HF_HOME), or ask for the right to it."
            yield Finding(name, "problem", f"{folder} cannot be written to", advice)
        elif free < 5:
            yield Finding(name, "note", f"{folder}, {free:.1f} GiB free", "Free some of the disk.")
        else:
            yield Finding(name, "ok", f"{folder}, {free:.0f} GiB free")


def _look_at_leftovers() -> Iterator[Finding]:
    """What killed processes left where exports, caches and temporary files are written."""
    cache = get_cache_folder()
    with contextlib.suppress(OSError):
        places = {Path(tempfile.gettempdir()), Path.cwd(), cache, *_list_folders(cache)}
        left = [
            folder
            for place in sorted(places)
            for folder in find_left(place, None, PARTIAL)
            if is_abandoned(folder)
        ]
        if left:
            size = sum(map(_measure, left)) / _GIB
            shown = ", ".join(map(str, left[:_SHOWN]))
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            yield Finding(
                "leftovers", "note", f"{size:.1f} GiB left by killed processes: {shown}{more}",
                "The next run that writes there removes them; removing them by hand is safe.",
            )  # fmt: skip


def _list_folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _measure(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size


def _look_at_hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_session

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: nothing is asked", "Unset it.")
        return
    try:
        answer = get_session().get(f"{endpoint}/api/models?limit=1", timeout=10)
    # Whatever the network raises is the finding.
    except Exception as error:  # noqa: BLE001
        yield Finding(
            "hub", "problem", f"{endpoint} does not answer ({type(error).__name__}: {error})",
            "Set HF_ENDPOINT to a mirror that does, or download the model elsewhere and give its "
            "folder.",
        )  # fmt: skip
        return
    good = answer.status_code < 400
    yield Finding(
        "hub", "ok" if good else "problem", f"{endpoint} answers with {answer.status_code}"
    )
