"""One more token of one answer on a CPU: ``cpu_step.cpp``, compiled once for the processor.

A token of a small model is a few hundred products of one row, which torch's operations read from
16 bits, each with its own overhead. Here it is one call that reads 4-bit weights as they are stored
and adds adapters before anything is rounded.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle

__all__ = ["RowStep", "make_row_step"]

logger = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).with_suffix(".cpp")
_DTYPES: Final = (torch.bfloat16, torch.float32)
#: What the kernel takes at once of a packed row, and of a head.
_PACKED, _WIDE = 32, 16

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weight", _pointer), ("scales", _pointer), ("rows", _int64), ("rank", _int64),
        ("first", _int64),
    ]  # fmt: skip


class _Group(ctypes.Structure):
    _fields_ = [
        ("parts", _Matrix * 3), ("count", _int64), ("rows", _int64), ("columns", _int64),
        ("blocksize", _int64), ("levels", _pointer), ("bias", _pointer), ("down", _pointer),
        ("up", _pointer), ("ranks", _int64),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _pointer), ("post_norm", _pointer), ("q_norm", _pointer),
        ("k_norm", _pointer), ("qkv", _Group), ("out", _Group), ("gate_up", _Group),
        ("down", _Group),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)), ("count", _int64), ("hidden", _int64),
        ("heads", _int64), ("groups", _int64), ("size", _int64), ("intermediate", _int64),
        ("vocabulary", _int64), ("embedding", _pointer), ("norm", _pointer), ("head", _pointer),
        ("epsilon", ctypes.c_double),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [
        ("token", _int64), ("position", _int64), ("keys", _pointer), ("values", _pointer),
        ("capacity", _int64), ("apart", _int64), ("cos", _pointer), ("sin", _pointer),
        ("logits", _pointer), ("threads", _int64),
    ]  # fmt: skip


class RowStep:
    """A decoder's model as the kernel reads it.

    Args:
        decoder: The :class:`decoder.Decoder`; its tensors are referred to where they lie.
        embedding: Shape ``(V, H)``.
        norm: The last one's weight, shape ``(H,)``.
        head: Shape ``(V, H)``.
    """

    def __init__(self, decoder: Any, embedding: Tensor, norm: Tensor, head: Tensor) -> None:
        self._run = _load()
        self._is_bfloat16 = int(decoder.dtype == torch.bfloat16)
        # What the pointers point to lives as long as this does.
        self._held: list[Any] = [decoder.layers, embedding, norm, head]
        layers = (_Layer * len(decoder.layers))(*(self._describe(one) for one in decoder.layers))
        self._model = _Model(
            layers, len(layers), embedding.shape[1], decoder.heads, decoder.kv_heads,
            decoder.head_dim, decoder.layers[0].down.group.columns, head.shape[0],
            embedding.data_ptr(), norm.data_ptr(), head.data_ptr(), decoder.epsilon,
        )  # fmt: skip
        self._vocabulary = head.shape[0]

    def run(
        self, cache: KeyValueCache, token: Tensor, position: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One token of the first slot.

        Args:
            cache: Read and written.
            token: int64, shape ``(1,)``.
            position: The same.
            rotation: Cosines and sines of every position, shape ``(C, D)`` each.

        Returns:
            Logits in float32, shape ``(1, V)``.
        """
        logits = torch.empty((1, self._vocabulary))
        cos, sin = rotation
        keys, values = cache.keys[0], cache.values[0]
        self._run(
            ctypes.byref(self._model),
            ctypes.byref(_Call(
                int(token), int(position), keys.data_ptr(), values.data_ptr(), cache.capacity,
                keys.numel(), cos.data_ptr(), sin.data_ptr(), logits.data_ptr(),
                torch.get_num_threads(),
            )),
            self._is_bfloat16,
        )  # fmt: skip
        return logits

    def _describe(self, layer: Any) -> _Layer:
        norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        groups = [self._describe_group(group) for group in layer.groups()]
        return _Layer(*(_address(one) for one in norms), *groups)

    def _describe_group(self, weights: DecodingWeights) -> _Group:
        group = weights.group
        levels = None
        if group.scales:
            levels = _read_levels(group.quant_type)
            self._held.append(levels)
        parts, first = (_Matrix * 3)(), 0
        scales: Sequence[Tensor | None] = group.scales or [None] * len(group.rows)
        read = zip(group.weights, scales, group.rows, group.adapters, strict=True)
        for index, (weight, scale, rows, adapter) in enumerate(read):
            rank = 0 if adapter is None else adapter.down.shape[0]
            parts[index] = _Matrix(weight.data_ptr(), _address(scale), rows, rank, first)
            first += rank
        return _Group(
            parts, len(group.rows), sum(group.rows), group.columns, group.blocksize,
            _address(levels), _address(group.bias), _address(weights.down),
            _address(weights.up), weights.rank,
        )  # fmt: skip


def make_row_step(decoder: Any, embedding: Tensor, norm: Tensor, head: Tensor) -> RowStep | None:
    """The kernel for a decoder's model, or ``None``, with the reason in the log.

    Args:
        decoder: As for :class:`RowStep`.
        embedding: The same.
        norm: The same.
        head: The same.
    """
    obstacle = _find_obstacle(decoder, embedding, norm, head)
    if obstacle is None:
        try:
            return RowStep(decoder, embedding, norm, head)
        # What inductor and the loader raise: no compiler that works, a folder without execution.
        except (RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:
            logger.debug("Compiling the decoder's step failed", exc_info=error)
            obstacle = f"compiling it failed: {(str(error).strip() or repr(error)).splitlines()[0]}"
    logger.info("Single tokens are computed by torch's own operations: %s.", obstacle)
    return None


def _find_obstacle(decoder: Any, *tensors: Tensor) -> str | None:
    if decoder.device.type != "cpu" or decoder.dtype not in _DTYPES:
        return f"{decoder.dtype} on {decoder.device.type}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the processor has neither AVX2 nor AVX512"
    read = list(tensors)
    for layer in decoder.layers:
        read += [one for one in layer[:4] if one is not None]
        for weights in layer.groups():
            group = weights.group
            if group.scales and (group.blocksize % _PACKED or group.columns % group.blocksize):
                return f"rows of {group.columns} weights in blocks of {group.blocksize}"
            read += group.weights if not group.scales else []
    if any(one.dtype != decoder.dtype or not one.is_contiguous() for one in read):
        return "its tensors are of several dtypes or lie apart"
    if decoder.head_dim % _WIDE:
        return f"heads of {decoder.head_dim}"
    return find_compile_obstacle(decoder.device)


@functools.cache
def _load() -> Any:
    return _compile()


def _compile(*defined: str) -> Any:
    """The kernel; inductor's own way of compiling keeps it beside the code of compiled layers."""
    from torch._inductor.codecache import CppCodeCache

    started = time.perf_counter()
    flags = ("-march=native", "-fopenmp", "-w", *(f"-D{name}" for name in defined))
    library = CppCodeCache.load(_SOURCE.read_text(encoding="utf-8"), extra_flags=flags)
    seconds = time.perf_counter() - started
    if seconds > 1:
        logger.info("Compiled the decoder's step for this processor, once: %.0f s.", seconds)
    step = library.qlora_kit_step
    step.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Call), ctypes.c_int]
    step.restype = None
    return step


def _read_levels(quant_type: str) -> Tensor:
    """The values of four bits, float32, shape ``(16,)``."""
    from bitsandbytes.functional import get_4bit_type

    levels: Tensor = get_4bit_type(quant_type, device="cpu").float().contiguous()
    return levels


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
