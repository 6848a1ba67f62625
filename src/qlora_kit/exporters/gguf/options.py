"""The options of ``gguf``, and what they amount to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from qlora_kit.errors import ConfigError
from qlora_kit.exporters.gguf.quantization.recipes import resolve_recipes
from qlora_kit.exporters.gguf.quantization.type_requests import TypeRequests, parse_requests

__all__ = ["GgufOptions"]

_DEFAULT: Final = "q8_0"

_Rounding = Literal["auto", "float32", "bfloat16", "float16"]

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([MG])B?", re.IGNORECASE)

#: Types that no importance changes: their blocks have one scale and nothing to weigh.
_UNGUIDED: Final = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "mxfp4_moe")

_MATRIX_SUFFIXES: Final = (".gguf", ".dat", ".imatrix")


@dataclass(frozen=True)
class GgufOptions:
    """Options of ``gguf``.

    Attributes:
        quantization: One type or several, such as ``["q4_k_m", "q8_0"]``; each becomes a file,
            and they share the merge. ``"auto:4.5bpw"`` (bits per weight), ``"auto:2.4GB"`` and
            ``"auto:500MB"`` choose every matrix's type by what it costs this model.
        quantization_method: The same under the name Unsloth users type.
        imatrix: What the quantizer is told about which weights matter: ``True`` watches the model
            read the rows it was trained on in this process; rows, texts or a text file are read
            instead of them; a ``.gguf`` or ``.dat`` file of ``llama-imatrix`` is taken as it is.
            What was collected is written beside the files.
        tensor_types: Types of single tensors by regular expression, such as
            ``{"ffn_down": "q6_k"}``; the first one found in a tensor's name counts.
        output_type: The type of the output matrix, and of embeddings tied to it.
        embedding_type: The type of the token embeddings.
        split_size: Split files whose tensors are larger, such as ``"4G"`` or ``"500M"`` (powers
            of 1000), or bytes.
        base: What a quantized base is merged into: ``"original"``, the 16-bit checkpoint it was
            quantized from; ``"dequantized"``, exactly the weights the adapter was trained on; or
            ``"auto"``: dequantized, which is the model that was trained.
        dtype: What merged weights are rounded to before they are encoded. ``"auto"`` is the
            base checkpoint's own 16-bit dtype, as for ``merged_16bit``, with which the merge is
            then shared; a base stored in float32 is not rounded, nor is anything with
            ``"float32"``.
        threads: Workers that encode; all cores by default.
        name: The model's name in the files and beginning of their names; by default the base's.
        modelfile: Whether to write an Ollama ``Modelfile``.
    """

    quantization: str | Sequence[str] = _DEFAULT
    quantization_method: str | Sequence[str] | None = None
    imatrix: Any = None
    tensor_types: Mapping[str, str] | None = None
    output_type: str | None = None
    embedding_type: str | None = None
    split_size: str | int | None = None
    base: Literal["auto", "original", "dequantized"] = "auto"
    dtype: _Rounding = "auto"
    threads: int | None = None
    name: str | None = None
    modelfile: bool = True

    def __post_init__(self) -> None:
        if self.quantization != _DEFAULT and self.quantization_method is not None:
            raise ConfigError(
                "quantization and quantization_method are the same option; give one of them."
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}.")
        recipes = [recipe.name for recipe in resolve_recipes(self.chosen)]
        if self.measures and self.requests != TypeRequests():
            raise ConfigError(
                "tensor_types, output_type and embedding_type say what quantization='auto:...' is "
                "to find out; give one or the other."
            )
        if self.uses_importance and set(recipes) <= set(_UNGUIDED):
            raise ConfigError(
                f"imatrix has no effect on {', '.join(recipes)}. Name a type that it improves, "
                "such as 'q4_k_m' or 'iq4_xs'."
            )
        matrix = self.importance_file
        if matrix is not None and not matrix.is_file():
            raise ConfigError(f"imatrix: there is no file {matrix}.")
        _ = (self.requests, self.part_bytes)  # refused here, before a model is looked at

    @property
    def chosen(self) -> str | Sequence[str]:
        """The quantizations asked for, under either name."""
        return self.quantization if self.quantization_method is None else self.quantization_method

    @property
    def requests(self) -> TypeRequests:
        """The types asked for by tensor."""
        return parse_requests(self.tensor_types, self.output_type, self.embedding_type)

    @property
    def uses_importance(self) -> bool:
        """Whether an importance matrix is to guide the quantizer."""
        # What is measured looks at rows anyway.
        return self.measures if self.imatrix is None else self.imatrix is not False

    @property
    def measures(self) -> bool:
        """Whether some file's types are chosen by what they cost."""
        return any(recipe.target is not None for recipe in resolve_recipes(self.chosen))

    @property
    def rows(self) -> Any:
        """What the model is watched on: rows that were given, or ``True`` for its own."""
        is_unsaid = self.imatrix is None or self.imatrix is False
        return True if is_unsaid or self.importance_file is not None else self.imatrix

    @property
    def importance_file(self) -> Path | None:
        """The importance matrix's file, where one was given rather than rows."""
        if not isinstance(self.imatrix, str | os.PathLike):
            return None
        path = Path(self.imatrix).expanduser()
        return path if path.suffix.lower() in _MATRIX_SUFFIXES else None

    @property
    def part_bytes(self) -> int | None:
        """Largest tensor data of one file, in bytes."""
        if self.split_size is None:
            return None
        if isinstance(self.split_size, str):
            match = _SIZE.fullmatch(self.split_size.strip())
            size = float(match[1]) * {"M": 1e6, "G": 1e9}[match[2].upper()] if match else 0.0
        else:
            size = self.split_size
        if size < 1:
            raise ConfigError(
                f"split_size must be a size such as '4G' or '500M', or bytes; got "
                f"{self.split_size!r}."
            )
        return int(size)
