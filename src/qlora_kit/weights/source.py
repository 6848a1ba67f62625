"""Where a checkpoint's tensors are read from, one at a time.

``TensorSource`` is the one interface exporters read weights through: plain files on disk
and a live adapted model look alike, and neither is ever in memory as a whole.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from qlora_kit.errors import ModelNotFoundError, UnsupportedModelError
from qlora_kit.weights.mapped_file import MappedFile

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsSource", "TensorSource"]

# Tensors whose pages stay: about as many as wait between a reader and a writer.
_KEPT: Final = 3


class TensorSource(Protocol):
    """Tensors of a checkpoint under their Hugging Face names (``model.layers.0...weight``)."""

    def names(self) -> Sequence[str]:
        """Every tensor's name, in file order. Tied copies are not repeated."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in a floating dtype (never quantized).

        Raises:
            KeyError: When there is no tensor of that name.
        """
        ...


class SafetensorsSource:
    """A folder with ``model.safetensors`` or a sharded set, memory-mapped.

    Args:
        folder: A checkpoint as ``save_pretrained`` writes it.

    Raises:
        ModelNotFoundError: When the folder holds no safetensors weights.
        UnsupportedModelError: When the index names a tensor or shard that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._mapped: dict[str, MappedFile] = {}
        self._recent: deque[str] = deque()
        self._file_of = _locate_tensors(folder)

    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The stored dtype as safetensors spells it, for example ``"BF16"``."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def load(self, name: str) -> torch.Tensor:
        """One tensor: a view of the file, which must not be written to.

        Its pages stop counting as this process's memory a few tensors later.
        """
        file = self._file_of[name]
        if file not in self._mapped:
            self._mapped[file] = MappedFile(self.folder / file)
        self._recent.append(name)
        if len(self._recent) > _KEPT:
            old = self._recent.popleft()
            self._mapped[self._file_of[old]].release(old)
        return self._mapped[file].load(name)

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor, without reading the others."""
        return self.load(name)[start:stop]

    def close(self) -> None:
        """Unmap the files."""
        self._handles.clear()
        self._mapped.clear()
        self._recent.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
        return self._handles[file]


def _locate_tensors(folder: Path) -> dict[str, str]:
    """Map each tensor name to its file, checking the index against the files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    found: dict[str, str] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ModelNotFoundError(
                f"{folder} holds no {file}; a checkpoint in safetensors format is needed."
            )
        try:
            with safe_open(str(path), framework="pt", device="cpu") as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        except SafetensorError as error:
            raise UnsupportedModelError(
                f"{path} is not a whole safetensors file: {error}"
            ) from error
    if index.is_file():
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise UnsupportedModelError(
                f"{folder}: the index names {len(missing)} tensors that its files lack, "
                f"for example {missing[0]!r}."
            )
    return found
