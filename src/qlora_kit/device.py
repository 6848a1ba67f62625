"""What this machine computes on: device, dtype, memory and names.

Everything here only looks, but for one thing: a process takes its one card.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit import ranks
from qlora_kit.config import DtypeName
from qlora_kit.errors import invalid_value

if TYPE_CHECKING:
    import torch

__all__ = [
    "can_reserve",
    "choose_compute_dtype",
    "fork_generators",
    "get_device",
    "get_device_name",
    "get_versions",
    "measure_free_bytes",
    "measure_memory_gib",
    "measure_peak_memory_gib",
    "reserve_memory",
    "reset_peak_memory",
    "to_torch_dtype",
]

_GIB = 1024**3
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_DTYPE_ALIASES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}


def get_device() -> torch.device:
    """The device models are put on: the first of CUDA/ROCm, XPU, MPS and CPU that exists.

    Of several cards it is the current one, and of several processes each takes its own, which
    becomes its current one.

    Raises:
        ConfigError: When a machine has more processes than cards.
    """
    import torch

    for kind in ("cuda", "xpu"):
        library = getattr(torch, kind, None)
        if library is not None and library.is_available():
            card = ranks.choose_card(library.device_count(), library.current_device())
            library.set_device(card)
            return torch.device(kind, card)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextlib.contextmanager
def fork_generators() -> Iterator[None]:
    """Put torch's generators of the processor and of this process's card back afterwards.

    The other cards of the machine are left alone: torch would begin to use each of them.
    """
    import torch

    cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cards):
        yield


def choose_compute_dtype(dtype: object, device: torch.device) -> DtypeName:
    """The dtype to compute in.

    Args:
        dtype: ``None`` to choose (bfloat16 where the hardware has it, else float16 on a GPU
            and float32 on a CPU), a name such as ``"bf16"``, or a ``torch.dtype``.
        device: The device it is for.

    Raises:
        ConfigError: When ``dtype`` is not one of the three.
    """
    if dtype is None:
        if _has_bfloat16(device):
            return "bfloat16"
        return "float32" if device.type == "cpu" else "float16"
    name = str(dtype).removeprefix("torch.").lower()
    if name not in _DTYPE_ALIASES:
        raise invalid_value(
            "dtype",
            "must be None, 'bfloat16', 'float16' or 'float32' (or the torch dtype)",
            dtype,
            "load_quantized",
        )
    return _DTYPE_ALIASES[name]  # type: ignore[return-value]


def to_torch_dtype(name: DtypeName | str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def get_device_name(device: torch.device) -> str:
    """A name a person recognises, for example ``"NVIDIA H200"`` or the CPU's model."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "xpu":
        return str(torch.xpu.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} (CPU, {torch.get_num_threads()} threads)"
    return f"{platform.processor() or platform.machine()} ({device.type})"


def measure_free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now: free ones, and those torch holds idle.

    A share that ``torch.cuda.set_per_process_memory_fraction`` set is all there is.
    """
    import psutil
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        free = min(free, int(share * total) - reserved)
        return max(0, int(free + reserved - torch.cuda.memory_allocated(device)))
    return int(psutil.virtual_memory().available)


def reserve_memory(device: torch.device, size: int) -> None:
    """Have torch take a piece of a GPU's memory at once, and hand parts of it out later.

    Tensors whose sizes change a little from step to step would each get a piece of their own as
    soon as one is larger than all before, until what is reserved is a fifth more than what is used.
    """
    import torch

    if can_reserve(device, size):
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device=device)


def can_reserve(device: torch.device, size: int) -> bool:
    """Whether so many bytes can be taken at once, and parts of them handed out."""
    import torch

    if device.type != "cuda" or not 0 < size <= 0.95 * measure_free_bytes(device):
        return False
    # With a limit, pieces beyond it are kept for tensors of that size.
    splits_all = torch.cuda.memory_stats(device).get("max_split_size", -1) in (-1, 0)
    return splits_all and torch.cuda.memory.get_allocator_backend() == "native"


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew, where the system allows it (CUDA, and Linux for a CPU).

    On CUDA, what torch holds idle of earlier work is given back: it is none of what follows.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        # "5" resets the process's peak resident set and nothing else (proc(5)).
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5", encoding="ascii")


def measure_memory_gib(device: torch.device) -> float:
    """Memory in use now, in GiB: what torch reserved on CUDA, the resident set elsewhere."""
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.memory_reserved(device)) / _GIB
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory()) / _GIB
    return int(psutil.Process().memory_info().rss) / _GIB


def measure_peak_memory_gib(device: torch.device) -> float:
    """Most memory in use since :func:`reset_peak_memory`, in GiB.

    Where the peak cannot be reset (a CPU under macOS or Windows) it is the process's since it
    started.
    """
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device)) / _GIB
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory()) / _GIB
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024**2
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss)) / _GIB


def get_versions() -> dict[str, str]:
    """Versions of qlora_kit, Python and every package that shapes the numbers."""
    versions = {"python": platform.python_version()}
    for name in (
        "qlora-kit", "torch", "transformers", "trl", "peft", "datasets", "accelerate",
        "bitsandbytes", "safetensors", "tokenizers", "unsloth", "gguf",
    ):  # fmt: skip
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Private, but the only way torch offers to ask; absent before torch 2.6.
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(ask())
    # MPS has bfloat16 from macOS 14 on, XPU always.
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return bool(device.type == "xpu")
