"""Where tokens enter the decoder, and where their scores come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.families import Family
from qlora_kit.engines.native.layers.family_reader import (
    read_embedding_multiplier,
    read_logit_scale,
    read_logit_softcap,
)

__all__ = ["DecodingVocabulary"]


class DecodingVocabulary:
    """The token embedding, the last norm and the head of a model.

    Args:
        base: The transformers model, without peft's around it.
        decoder: Its decoder.
        family: Its family.

    Attributes:
        embedding: Shape ``(V, H)``.
        head: The same shape, often the same tensor.
        norm: The module of the last norm.
        multipliers: What embeddings are multiplied with, one after the other: rounded between.
        logit_scale: What logits are multiplied with.
        logit_softcap: What they are soft-capped at; 0 for no cap.
    """

    def __init__(self, base: Any, decoder: Any, family: Family) -> None:
        module, config = base.get_input_embeddings(), base.config.get_text_config()
        self.embedding: Tensor = module.weight.detach()
        self.head: Tensor = base.get_output_embeddings().weight.detach()
        self.norm = decoder.norm
        own = getattr(module, "embed_scale", None)
        # As Gemma's module does: in the weight's dtype.
        rounded = 1.0 if own is None else float(own.to(self.embedding.dtype))
        self.multipliers = [
            one for one in (rounded, read_embedding_multiplier(config, family)) if one != 1.0
        ]
        self.logit_scale = read_logit_scale(config, family)
        self.logit_softcap = read_logit_softcap(config, family)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The first layer's input for tokens of shape ``(T,)``, shape ``(T, H)``."""
        hidden = self.embedding[tokens]
        for factor in self.multipliers:
            hidden = hidden * factor
        return hidden

    def score(self, hidden: Tensor) -> Tensor:
        """Logits of the last layer's output ``(T, H)``, shape ``(T, V)``."""
        return self.finish(torch.nn.functional.linear(self.norm(hidden), self.head))

    def finish(self, logits: Tensor) -> Tensor:
        """What follows the head's product."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap:
            logits = (logits / self.logit_softcap).tanh() * self.logit_softcap
        return logits
