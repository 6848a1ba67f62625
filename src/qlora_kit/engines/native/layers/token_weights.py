"""The weights of the vocabulary: frozen, trained whole, or trained for some tokens alone.

The token embedding and the head may be one weight. Their gradient is gathered in float32 over a
whole step, like the adapters' (:mod:`adapter_copies`): the head's share chunk by chunk, so that
no logits are kept for it, the embedding's from the first layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["TokenWeight", "read_token_weight"]

#: Rows of the head whose product with the hidden states exists at the same time.
_BLOCK: Final = 8192


@dataclass(frozen=True)
class _Found:
    """What lies behind peft's wrappers: a weight, and what of it trains."""

    base: Any
    trained: Tensor | None
    tokens: tuple[int, ...] | None = None


class TokenWeight:
    """One weight of shape ``(V, H)`` and the gradient of what trains in it.

    Args:
        weight: What is computed with, where no tokens train alone.
        trained: The parameter that trains: the weight itself, or rows ``(n, H)`` that stand for
            those of ``tokens``; ``None`` when it is frozen.
        tokens: See ``trained``.
        share: What the summed loss is multiplied by, a scalar tensor that each step sets.
    """

    def __init__(
        self, weight: Tensor, trained: Tensor | None, tokens: tuple[int, ...] | None, share: Tensor
    ) -> None:
        self.trained = trained
        self._share = share
        self._rows: Tensor | None = None
        self._places: Tensor | None = None
        self.weight = weight.detach()
        if trained is None:
            return
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._gradient = torch.zeros(trained.shape, dtype=wide, device=weight.device)
        if tokens is not None:
            # Copied: the base stays as it is, and a step reads one matrix.
            self.weight = self.weight.clone()
            self._rows = torch.tensor(tokens, device=weight.device)
            self._places = torch.full((weight.shape[0],), -1, device=weight.device)
            self._places[self._rows] = torch.arange(len(tokens), device=weight.device)

    def nbytes(self) -> int:
        """Bytes of the gathered gradient, of what is handed to the optimizer, and of a copy."""
        if self.trained is None:
            return 0
        own = self.weight.nbytes if self._rows is not None else 0
        return int(self._gradient.nbytes + self.trained.nbytes + own)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What the gradient is gathered in."""
        return self._gradient.dtype

    @property
    def gradient_count(self) -> int:
        """How many numbers it has."""
        return int(self._gradient.numel())

    def place_gradients(self, buffer: Tensor) -> None:
        """Gather it in a buffer of :attr:`gradient_count` numbers from now on."""
        self._gradient = buffer.view(self._gradient.shape)

    def refresh(self) -> None:
        """Take the present values of what trains."""
        if self._rows is not None and self.trained is not None:
            self.weight[self._rows] = self.trained.detach().to(self.weight.dtype)
        elif self.trained is not None:
            # Anew: several processes give the parameter another storage before their first step.
            self.weight = self.trained.detach()

    def clear_gradients(self) -> None:
        """Start a step."""
        if self.trained is not None:
            self._gradient.zero_()

    def gather_gradients(self) -> None:
        """Nothing: they are gathered while they are computed."""

    def drop_gradients(self) -> None:
        """The same."""

    def publish_gradients(self) -> None:
        """Make the gathered gradient the parameter's own."""
        if self.trained is not None:
            self.trained.grad = self._gradient.to(self.trained.dtype)

    def add_head(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the head's share for a chunk.

        Args:
            gradient: Of the summed loss with respect to the logits, shape ``(P, V)``.
            hidden: The head's input, shape ``(P, H)``.
        """
        if self._rows is not None:
            product = _multiply_wide(gradient[:, self._rows], hidden, self._gradient.dtype)
            self._gradient.addcmul_(product, self._share)
            return
        for start in range(0, gradient.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            product = _multiply_wide(gradient[:, part], hidden, self._gradient.dtype)
            self._gradient[part].addcmul_(product, self._share)

    def add_embedding(self, input_ids: Tensor, gradient: Tensor, skipped: int | None) -> None:
        """Add the embedding's share for a micro-batch.

        Args:
            input_ids: Shape ``(T,)``.
            gradient: Of the step's loss with respect to what was looked up, shape ``(T, H)``.
            skipped: The token whose row gets none, ``padding_idx``.
        """
        wide = gradient.to(self._gradient.dtype)
        places = input_ids if self._places is None else self._places[input_ids]
        kept = places >= 0
        if skipped is not None:
            kept &= input_ids != skipped
        # Sorted by index inside, so that the order of additions is the same in every run.
        self._gradient.index_put_((places.clamp(min=0),), wide * kept[:, None], accumulate=True)


def read_token_weight(module: Any, dtype: torch.dtype) -> tuple[Any, Tensor, Any, Any] | None:
    """A token embedding's or a head's weight and what of it trains.

    Args:
        module: The model's, with or without peft's wrapper around it.
        dtype: The dtype the model computes in.

    Returns:
        The module that holds the weight, the weight, the parameter that trains (or ``None``) and
        the tokens it stands for (or ``None`` for all); nothing where the module does something else
        with them, so that it has to be called.
    """
    found = _unwrap(module)
    if found is None or not _is_plain(found.base):
        return None
    base = found.base
    if getattr(base, "bias", None) is not None or base.weight.dtype != dtype:
        return None
    if isinstance(base, torch.nn.Embedding) and (
        base.max_norm is not None or base.scale_grad_by_freq or base.sparse
    ):
        return None
    return base, base.weight, found.trained, found.tokens


def _is_plain(base: Any) -> bool:
    """Whether a module does nothing but look up or multiply; Gemma's lookup multiplies after it."""
    kind = type(base)
    return kind in (torch.nn.Embedding, torch.nn.Linear) or (
        kind.__name__.endswith("TextScaledWordEmbedding")
        and kind.__module__.startswith("transformers.models.")
    )


def _unwrap(module: Any) -> _Found | None:
    kind = type(module).__name__
    if kind == "ModulesToSaveWrapper":
        base = (
            module.modules_to_save[module.active_adapters[0]]
            if module.active_adapters and not module.disable_adapters
            else module.original_module
        )
        return _Found(base, base.weight if base.weight.requires_grad else None)
    if kind == "TrainableTokensWrapper":
        layer = module.token_adapter
        active = [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]
        if len(active) != 1 or layer.disable_adapters or layer.merged:
            return None
        rows = layer.trainable_tokens_delta[active[0]]
        base = layer.base_layer
        if not rows.requires_grad or base.weight.requires_grad:
            return None
        return _Found(base, rows, tuple(layer.token_indices[active[0]]))
    if hasattr(module, "base_layer"):
        return None
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    return _Found(module, weight if weight.requires_grad else None)


def _multiply_wide(gradient: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient.T @ hidden`` in a wider dtype: sums over thousands of tokens leave float16's."""
    if gradient.dtype == dtype:
        return gradient.T @ hidden
    if gradient.is_cuda:
        return torch.mm(gradient.T, hidden, out_dtype=dtype)
    return gradient.T.to(dtype) @ hidden.to(dtype)
