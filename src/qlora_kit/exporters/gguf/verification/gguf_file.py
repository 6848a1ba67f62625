"""A written ``.gguf`` file read back: its vocabulary and rows of its tensors."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ExportError
from qlora_kit.exporters.gguf.tokenizer.comparison import is_called_like_phi3
from qlora_kit.exporters.gguf.tokenizer.vocabulary import Vocabulary
from qlora_kit.weights.mapped_file import release_pages

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

    from qlora_kit.exporters.gguf.conversion.file_plan import Plan
    from qlora_kit.exporters.gguf.quantization.recipes import Recipe

__all__ = ["GgufFile", "find_parts", "read_types"]

_ROLES = ("bos", "eos", "unknown", "padding", "eot", "eom")


class GgufFile:
    """A file, memory-mapped.

    Args:
        path: A ``.gguf`` file.
        others: The parts that follow it, where the model is split into several.

    Raises:
        ExportError: When it cannot be read.
    """

    def __init__(self, path: Path, *others: Path) -> None:
        self.path = path
        readers = [_open(part) for part in (path, *others)]
        self._reader: GGUFReader = readers[0]
        self.tensors: Mapping[str, ReaderTensor] = {
            tensor.name: tensor for reader in readers for tensor in reader.tensors
        }

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, or ``default`` where the key is absent."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def keys(self) -> list[str]:
        """Names of the metadata."""
        return list(self._reader.fields)

    def type_of(self, name: str) -> str:
        """A tensor's storage type."""
        return str(self.tensors[name].tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows of a tensor, decoded.

        Args:
            name: The tensor.
            rows: Indices into its rows, all leading dimensions taken as one.

        Returns:
            Float32 of shape (len(rows), columns).
        """
        import numpy as np
        from gguf import quants

        tensor = self.tensors[name]
        data = tensor.data.reshape(-1, tensor.data.shape[-1]) if tensor.data.ndim else tensor.data
        chosen = np.ascontiguousarray(data[rows])
        # Else all files would be in memory by the end: reading a few rows maps many pages.
        release_pages(tensor.data.ctypes.data, tensor.data.nbytes)
        decoded: NDArray[np.float32] = quants.dequantize(chosen, tensor.tensor_type)
        return decoded.astype(np.float32, copy=False).reshape(len(rows), -1)

    def vocabulary(self) -> Vocabulary:
        """What the file says about tokenizing."""
        ids = {role: self.value(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
        return Vocabulary(
            model=self.value("tokenizer.ggml.model"),
            pre=self.value("tokenizer.ggml.pre"),
            tokens=tuple(self.value("tokenizer.ggml.tokens")),
            types=tuple(self.value("tokenizer.ggml.token_type")),
            scores=tuple(self.value("tokenizer.ggml.scores", ())),
            merges=tuple(self.value("tokenizer.ggml.merges", ())),
            special_ids={role: int(index) for role, index in ids.items() if index is not None},
            adds_bos=bool(self.value("tokenizer.ggml.add_bos_token")),
            adds_eos=bool(self.value("tokenizer.ggml.add_eos_token")),
            adds_space_prefix=bool(self.value("tokenizer.ggml.add_space_prefix")),
            strips_after_special=is_called_like_phi3(self.value("general.name", "")),
            chat_template=self.value("tokenizer.chat_template"),
        )


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    # The reader indexes a memory map; a truncated file surfaces as any of these.
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise ExportError(f"{path} cannot be read back: {error}") from error


def find_parts(folder: Path, plan: Plan, recipe: Recipe) -> list[Path]:
    """The files of a recipe in a folder, in order; how many there are is known to them alone."""
    stem = f"{plan.name}.{recipe.name.upper()}"
    parts = sorted(folder.glob(f"{glob.escape(stem)}-?????-of-?????.gguf"))
    return parts or [folder / f"{stem}.gguf"]


def read_types(parts: Sequence[Path]) -> dict[str, str]:
    """The type of every tensor of a file."""
    file = GgufFile(*parts)
    return {name: file.type_of(name) for name in file.tensors}
