"""The merged weights of a live model, read as every 16-bit export of it has them.

A base that is published in 16 bits is merged in float32 and rounded to those 16 bits once, as
``merged_16bit`` does: both formats hold the same numbers, and asked for together they merge
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_kit.device import to_torch_dtype
from qlora_kit.handles import LoadedModel
from qlora_kit.weights.merge_base import choose_merge_base, find_stored_dtype
from qlora_kit.weights.merged import MergedWeights

if TYPE_CHECKING:
    import torch

    from qlora_kit.weights.shared_merge import SharedMerge

__all__ = ["choose_rounding", "open_merged"]

_16_BITS = ("bfloat16", "float16")


def open_merged(
    model: LoadedModel, base: str, dtype: str, shared: SharedMerge | None = None
) -> Any:
    """The merged tensors as a ``TensorSource``; close it.

    Args:
        model: The live model, only read.
        base: ``"auto"``, ``"original"`` or ``"dequantized"``.
        dtype: ``"auto"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``, which rounds nothing.
        shared: What other exports of the same call have merged already.

    Raises:
        ConfigError: When the base asked for does not exist or does not fit the adapter.
        UnsupportedModelError: When something in the model cannot be merged.
    """
    chosen = choose_merge_base(model, base)
    rounding = choose_rounding(model, dtype)
    if shared is None or rounding is None:
        return MergedWeights(model, chosen, dtype=rounding)
    return shared.open(model, chosen, rounding)


def choose_rounding(model: LoadedModel, asked: str) -> torch.dtype | None:
    """What merged weights are rounded to, or ``None`` where they stay in float32.

    ``"auto"`` is the base checkpoint's own 16-bit dtype, and float32 where it is published in
    more.
    """
    if asked == "auto":
        asked = find_stored_dtype(model)
        if asked not in _16_BITS:
            return None
    return None if asked == "float32" else to_torch_dtype(asked)
