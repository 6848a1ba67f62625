"""llama.cpp itself, through the C functions that xllamacpp's extension module exports.

The parameter structs are passed as opaque blocks larger than any version's: the library
fills them with defaults, and only the context length, their first member, is set here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_Token = ctypes.c_int32


class _Opaque(ctypes.Structure):
    _fields_ = [("n_first", ctypes.c_uint32), ("rest", ctypes.c_ubyte * 1020)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(_Token)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
log_lines: list[str] = []


@_LogCallback
def _log(level: int, text: bytes, _: Any) -> None:
    if level >= 3:
        log_lines.append(text.decode(errors="replace"))


@functools.cache
def _library() -> Any:
    pytest.importorskip("xllamacpp", reason="xllamacpp runs the files these tests write")
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    lib = ctypes.CDLL(spec.origin)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [_LogCallback, pointer]),
        "llama_model_default_params": (_Opaque, []),
        "llama_context_default_params": (_Opaque, []),
        "llama_model_load_from_file": (pointer, [text, _Opaque]),
        "llama_init_from_model": (pointer, [pointer, _Opaque]),
        "llama_set_n_threads": (None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (ctypes.c_int32, [pointer, _Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_vocab_is_eog": (ctypes.c_bool, [pointer, _Token]),
        "llama_tokenize": (
            ctypes.c_int32,
            [pointer, text, ctypes.c_int32, ctypes.POINTER(_Token), ctypes.c_int32]
            + [ctypes.c_bool] * 2,
        ),
        "llama_adapter_lora_init": (pointer, [pointer, text]),
        "llama_set_adapters_lora": (
            ctypes.c_int32,
            [pointer, ctypes.POINTER(pointer), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)],
        ),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log, None)
    return lib


class Llama:
    """A file, loaded; one thread."""

    def __init__(self, path: Path, n_ctx: int = 512, lora: Path | None = None) -> None:
        self._lib = lib = _library()
        log_lines.clear()
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {path}: {''.join(log_lines)}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary_size = lib.llama_vocab_n_tokens(self._vocab)
        self._adapter = None
        if lora is not None:
            self._adapter = lib.llama_adapter_lora_init(self._model, str(lora).encode())
            if not self._adapter:
                raise RuntimeError(f"llama.cpp did not load {lora}: {''.join(log_lines)}")
        self._n_ctx = n_ctx

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_model_free(self._model)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Next-token logits after every token, shape (len(ids), vocabulary)."""
        lib = self._lib
        parameters = lib.llama_context_default_params()
        parameters.n_first = self._n_ctx
        context = lib.llama_init_from_model(self._model, parameters)
        assert context, "".join(log_lines)
        lib.llama_set_n_threads(context, 1, 1)
        if self._adapter is not None:
            adapters = (ctypes.c_void_p * 1)(self._adapter)
            assert lib.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, index in enumerate(ids):
                batch.token[position] = index
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = 1
            assert lib.llama_decode(context, batch) == 0, "".join(log_lines)
            rows = [
                np.ctypeslib.as_array(
                    lib.llama_get_logits_ith(context, position), (self.vocabulary_size,)
                ).copy()
                for position in range(len(ids))
            ]
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)
        return np.stack(rows)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids, special tokens in the text recognized."""
        data = text.encode()
        room = len(data) + 16
        out = (_Token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), out, room, add_special, True)
        assert count >= 0
        return list(out[:count])

    def is_end(self, index: int) -> bool:
        """Whether generation stops at a token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, index))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most likely continuation, token by token."""
        made = list(ids)
        for _ in range(count):
            made.append(int(self.logits(made)[-1].argmax()))
        return made[len(ids) :]


def kl_divergence(right: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(right || other) per position, from logits of shape (positions, vocabulary)."""
    p, q = (_log_softmax(np.asarray(values, dtype=np.float64)) for values in (right, other))
    return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
