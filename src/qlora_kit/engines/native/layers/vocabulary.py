"""Where token ids enter a model and its loss comes out: the token embedding and the head."""

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
from qlora_kit.engines.native.layers.loss import (
    SoftmaxStep,
    linear_cross_entropy,
    module_cross_entropy,
)
from qlora_kit.engines.native.layers.token_weights import TokenWeight, read_token_weight

__all__ = ["Vocabulary"]


class Vocabulary:
    """The token embedding and the language-model head, frozen or trained, tied or not.

    Args:
        base: The transformers model, without peft's around it.
        dtype: The dtype it computes in.
        family: Its family, some of which multiply embeddings and logits, or cap these.

    Attributes:
        share: What the summed loss is multiplied by; each step sets it.
        trained: The weights whose gradients are gathered here; a tied one once.
        size: Tokens that the head scores.
    """

    def __init__(self, base: Any, dtype: torch.dtype, family: Family) -> None:
        self._embedding, self._head = base.get_input_embeddings(), base.get_output_embeddings()
        device = self._embedding.weight.device
        self.share = torch.ones((), device=device)
        self._weights: dict[tuple[int, int], TokenWeight] = {}
        lookup = read_token_weight(self._embedding, dtype)
        scores = read_token_weight(self._head, dtype)
        self._lookup = None if lookup is None else self._share_weight(lookup)
        self._scores = None if scores is None else self._share_weight(scores)
        self._lookup_module = None if lookup is None else lookup[0]
        config = base.config.get_text_config()
        self._multiplier = read_embedding_multiplier(config, family)
        self._scale = read_logit_scale(config, family)
        self._softcap = read_logit_softcap(config, family)
        self.trained = [one for one in self._weights.values() if one.trained is not None]
        self.size = int(self._head.weight.shape[0] if scores is None else scores[1].shape[0])

    def look_up(self, input_ids: Tensor) -> Tensor:
        """The first layer's input for ids of shape ``(T,)``, shape ``(T, H)``."""
        wants_grad = torch.is_grad_enabled()
        weight, module = self._lookup, self._lookup_module
        if weight is None or module is None:
            found: Tensor = self._embedding(input_ids[None])[0]
            found = found if self._multiplier == 1.0 else found * self._multiplier
            # Nothing of it may train; asking for a gradient lets layers share one graph.
            return found if found.requires_grad else found.requires_grad_(wants_grad)
        hidden = torch.nn.functional.embedding(input_ids, weight.weight).requires_grad_(wants_grad)
        if wants_grad and weight.trained is not None:
            hidden.register_hook(
                lambda gradient: weight.add_embedding(input_ids, gradient, module.padding_idx)
            )
        own = getattr(module, "embed_scale", None)
        if own is not None:
            # Gemma's embedding multiplies what it looks up, by a number in the weight's dtype.
            hidden = hidden * own.to(hidden.dtype)
        return hidden if self._multiplier == 1.0 else hidden * self._multiplier

    def loss(
        self, hidden: Tensor, targets: Tensor, chunk: int, step: SoftmaxStep
    ) -> tuple[Tensor, Tensor]:
        """Summed loss of the head's input ``(P, H)``; see :func:`loss.linear_cross_entropy`."""
        weight = self._scores
        if weight is None:
            return module_cross_entropy(
                hidden, self._head, targets, chunk, step, self.share, self._scale, self._softcap
            )
        gather = None if weight.trained is None else weight.add_head
        # Here rather than times the logits, of which there are many more.
        hidden = hidden if self._scale == 1.0 else hidden * self._scale
        return linear_cross_entropy(
            hidden, weight.weight, targets, chunk, step, gather, self._softcap
        )

    def _share_weight(self, found: tuple[Any, Tensor, Any, Any]) -> TokenWeight:
        _, weight, trained, tokens = found
        key = (id(weight), id(trained))
        if key not in self._weights:
            self._weights[key] = TokenWeight(weight, trained, tokens, self.share)
        return self._weights[key]
