"""What a decoder-only language model computes: layers, attention, experts, projections, the loss.

Functions of tensors, forward and backward, and what reads those tensors out of a model in memory.
Training (:mod:`~qlora_kit.engines.native.fast`) and answering
(:mod:`~qlora_kit.engines.native.decoding`) both build on it; it knows neither.
"""

from typing import Final

__all__ = ["CAPPED_QUERIES"]

#: Queries whose soft-capped scores are held at once where no kernel keeps them on the chip.
CAPPED_QUERIES: Final = 512
