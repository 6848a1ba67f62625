"""The text model inside of one that also sees: its tensors under the names it has alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    import torch

__all__ = ["TextSource", "name_in_text_model"]

#: How wrappers begin the names of their text model, and how it calls itself; older files too.
_PREFIXES: Final = (
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)


def name_in_text_model(name: str) -> str | None:
    """What the text model alone calls a tensor of its wrapper, ``None`` for other parts."""
    for prefix, own in _PREFIXES:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None


class TextSource:
    """A wrapper's tensors as those of its text model; a plain model's as they are.

    Args:
        source: The model's tensors.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        names = list(source.names())
        self._is_wrapped = any("language_model." in name for name in names)
        found = {name: name_in_text_model(name) if self._is_wrapped else name for name in names}
        self._names = {own: name for name, own in found.items() if own is not None}
        self.left_out = [name for name, own in found.items() if own is None]

    def names(self) -> Sequence[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def load(self, name: str) -> torch.Tensor:
        return self._source.load(self._names[name])

    def close(self) -> None:
        """The source is its opener's to close."""

    def plan(self, planned: PlannedTensor) -> PlannedTensor:
        """A tensor planned from this source, to be made from the one that it wraps."""
        if not self._is_wrapped:
            return planned
        names: Mapping[str, str] = self._names
        return dataclasses.replace(
            planned,
            sources=tuple(names[name] for name in planned.sources),
            load=lambda source: planned.load(TextSource(source)),
        )
