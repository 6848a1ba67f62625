"""One merge for several exports.

When a call asks for several formats, the merged 16-bit checkpoint is written once and the
others read it back from disk instead of merging again. An export gives the same bytes
either way: rounding to 16 bits comes before whatever the other format does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.weights.merged import MergeBase, MergedWeights
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

    from qlora_kit.handles import LoadedModel

__all__ = ["SharedMerge"]


@dataclass
class SharedMerge:
    """Merged checkpoints that exports of one call have written, by base and dtype.

    Attributes:
        merges: How often :meth:`open` had to merge from the live model.
    """

    merges: int = 0
    _folders: dict[tuple[str, str], Path] = field(default_factory=dict)

    def offer(self, base: MergeBase, dtype: torch.dtype, folder: Path) -> None:
        """Say that a finished merged checkpoint will stand in ``folder``.

        One that stands already is kept: it may outlast a folder such as an upload's.
        """
        if not _is_finished(self._folders.get((base, str(dtype)))):
            self._folders[base, str(dtype)] = folder

    def withdraw(self, folder: Path) -> None:
        """Say that the checkpoint offered for ``folder`` was not finished after all."""
        self._folders = {key: path for key, path in self._folders.items() if path != folder}

    def open(self, model: LoadedModel, base: MergeBase, dtype: torch.dtype) -> Any:
        """The merged tensors: from a finished checkpoint if there is one, else from the model.

        Returns:
            A :class:`MergedWeights` (whose ``load`` may be redirected to the files); close it.
        """
        folder = self._folders.get((base, str(dtype)))
        merged = MergedWeights(model, base, dtype=dtype)
        if folder is not None and _is_finished(folder):
            return _WrittenMerge(merged, SafetensorsSource(folder))
        self.merges += 1
        return merged


def _is_finished(folder: Path | None) -> bool:
    return folder is not None and (folder / "config.json").is_file()


class _WrittenMerge:
    """``MergedWeights`` whose tensors come from files that hold them already."""

    def __init__(self, merged: MergedWeights, files: SafetensorsSource) -> None:
        self._merged = merged
        self._files = files

    def load(self, name: str) -> torch.Tensor:
        return self._files.load(name)

    def close(self) -> None:
        self._files.close()
        self._merged.close()

    def __enter__(self) -> _WrittenMerge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._merged, name)
