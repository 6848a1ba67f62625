"""One more token of one answer on a CPU: ``cpu_step.cpp``, compiled once for the processor.

A token of a small model is a few hundred products of one row, which torch's operations read from
16 bits, each with its own overhead. Here it is one call that reads 4-bit weights as they are stored
and adds adapters before anything is rounded.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qlora_kit.engines.native.decoding.kv_cache import KeyValueCache
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle
from qlora_kit.engines.native.layers.family_reader import read_norm
from qlora_kit.engines.native.layers.layer import LayerTensors, Norm

__all__ = ["RowStep", "make_row_step"]

logger = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).with_suffix(".cpp")
_DTYPES: Final = (torch.bfloat16, torch.float32)
#: In the kernel's order.
_ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
#: What the kernel takes at once of a packed row, and of a head.
_PACKED, _WIDE = 32, 16

_int64, _pointer, _float = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


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


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer), ("apart", _int64)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in LayerTensors._fields[:6]),
        *((name, _Group) for name in LayerTensors._fields[6:]),
        ("window", _int64),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _int64) for name in (
            "count", "hidden", "heads", "groups", "size", "intermediate", "vocabulary",
        )),
        ("embedding", _pointer), ("norm", _Norm), ("head", _pointer), ("epsilon", ctypes.c_double),
        *((name, _float) for name in (
            "multiplier", "scale", "softcap", "residual", "logit_scale", "logit_softcap",
        )),
        *((name, _int64) for name in (
            "centers", "plus_one", "over_all", "turned", "in_pairs", "is_gated", "is_parallel",
            "activation",
        )),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [
        ("token", _int64), ("position", _int64), ("keys", _pointer), ("values", _pointer),
        ("capacity", _int64), ("apart", _int64), ("cos", _pointer), ("sin", _pointer),
        ("turns", _int64), ("stretch", _pointer), ("logits", _pointer), ("threads", _int64),
    ]  # fmt: skip


class _Turns:
    """A room's rotations as the kernel reads them: float32, an address for each layer."""

    def __init__(self, rotations: Any) -> None:
        self.of = rotations
        kept: dict[int, Tensor] = {}
        pointers = []
        for one in (one for rotation in rotations.layers for one in rotation):
            if id(one) not in kept:
                kept[id(one)] = one.float().contiguous()
            pointers.append(kept[id(one)].data_ptr())
        self._held = kept
        count = len(rotations.layers)
        self.cos = (_pointer * count)(*pointers[::2])
        self.sin = (_pointer * count)(*pointers[1::2])
        self.width: int = rotations.layers[0].cos.shape[1]
        stretch = rotations.stretch
        self.stretch = None if stretch is None else stretch.float().flatten().contiguous()


class RowStep:
    """A decoder's model as the kernel reads it.

    Args:
        decoder: The :class:`decoder.Decoder`; its tensors are referred to where they lie.
    """

    def __init__(self, decoder: Any) -> None:
        self._run = _load()
        self._is_bfloat16 = int(decoder.dtype == torch.bfloat16)
        vocabulary, shape = decoder.vocabulary, decoder.shape
        embedding, head = vocabulary.embedding, vocabulary.head
        # What the pointers point to lives as long as this does.
        self._held: list[Any] = [decoder.layers, embedding, head]
        self._turns: _Turns | None = None
        self._head_dim: int = shape.head_dim
        layers = (_Layer * len(decoder.layers))(*(self._describe(one) for one in decoder.layers))
        intermediate = decoder.layers[0].tensors.down.group.columns
        self._model = _Model(
            layers, len(layers), embedding.shape[1], shape.heads, shape.kv_heads, shape.head_dim,
            intermediate, head.shape[0], embedding.data_ptr(),
            self._describe_norm(read_norm(vocabulary.norm)), head.data_ptr(), shape.epsilon,
            math.prod(vocabulary.multipliers), shape.scale, shape.softcap, shape.residual,
            vocabulary.logit_scale, vocabulary.logit_softcap, shape.norm.startswith("layer"),
            shape.norm.endswith("plus_one"), shape.head_norms_over_all, shape.head_norms_turned,
            shape.turns_pairs, shape.is_gated, shape.is_parallel,
            _ACTIVATIONS.index(shape.activation),
        )  # fmt: skip
        self._vocabulary = head.shape[0]

    def run(self, cache: KeyValueCache, token: Tensor, position: Tensor, rotations: Any) -> Tensor:
        """One token of the first slot.

        Args:
            cache: Read and written.
            token: int64, shape ``(1,)``.
            position: The same.
            rotations: The :class:`decoder.Rotations` of the cache's room.

        Returns:
            Logits in float32, shape ``(1, V)``.
        """
        logits = torch.empty((1, self._vocabulary))
        keys, values = cache.keys[0], cache.values[0]
        turns = self._turns
        if turns is None or turns.of is not rotations:
            turns = self._turns = _Turns(rotations)
        self._run(
            ctypes.byref(self._model),
            ctypes.byref(_Call(
                int(token), int(position), keys.data_ptr(), values.data_ptr(), cache.capacity,
                keys.numel(), ctypes.addressof(turns.cos), ctypes.addressof(turns.sin), turns.width,
                _address(turns.stretch), logits.data_ptr(), torch.get_num_threads(),
            )),
            self._is_bfloat16,
        )  # fmt: skip
        return logits

    def _describe(self, layer: Any) -> _Layer:
        tensors = layer.tensors
        norms = [self._describe_norm(norm) for norm in tensors[:6]]
        groups = [self._describe_group(group) for group in tensors[6:]]
        return _Layer(*norms, *groups, layer.window)

    def _describe_norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm(None, None, 0)
        self._held.append(norm)
        # Of queries and keys: the same for all heads, or each head's own, one after the other.
        apart = 0 if norm.weight.numel() == self._head_dim else self._head_dim
        return _Norm(norm.weight.data_ptr(), _address(norm.bias), apart)

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


def make_row_step(decoder: Any) -> RowStep | None:
    """The kernel for a decoder's model, or ``None``, with the reason in the log.

    Args:
        decoder: As for :class:`RowStep`.
    """
    obstacle = _find_obstacle(decoder)
    if obstacle is None:
        try:
            return RowStep(decoder)
        # What inductor and the loader raise: no compiler that works, a folder without execution.
        except (RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:
            logger.debug("Compiling the decoder's step failed", exc_info=error)
            obstacle = f"compiling it failed: {(str(error).strip() or repr(error)).splitlines()[0]}"
    logger.info("Single tokens are computed by torch's own operations: %s.", obstacle)
    return None


def _find_obstacle(decoder: Any) -> str | None:
    if decoder.device.type != "cpu" or decoder.dtype not in _DTYPES:
        return f"{decoder.dtype} on {decoder.device.type}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the processor has neither AVX2 nor AVX512"
    if any(layer.experts is not None for layer in decoder.layers):
        return "tokens go to experts"
    vocabulary = decoder.vocabulary
    read = [vocabulary.embedding, vocabulary.head]
    norms = [read_norm(vocabulary.norm)]
    for layer in decoder.layers:
        norms += [one for one in layer.tensors[:6] if one is not None]
        for weights in layer.groups():
            group = weights.group
            if group.scales and (group.blocksize % _PACKED or group.columns % group.blocksize):
                return f"rows of {group.columns} weights in blocks of {group.blocksize}"
            read += group.weights if not group.scales else []
    read += [one for norm in norms for one in norm if one is not None]
    if any(one.dtype != decoder.dtype or not one.is_contiguous() for one in read):
        return "its tensors are of several dtypes or lie apart"
    if decoder.shape.head_dim % _WIDE or len(decoder.turned_widths) > 1:
        return f"heads of {decoder.shape.head_dim}"
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
