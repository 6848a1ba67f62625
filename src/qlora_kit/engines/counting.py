"""Counting what a trainer really consumes, the same way for every engine."""

from __future__ import annotations

from typing import Any

__all__ = ["TokenCounter"]


class TokenCounter:
    """Mixin for ``transformers.Trainer``: counts tokens as batches are taken for a step.

    Counting in the collator would include evaluation and prefetched batches.

    Attributes:
        tokens_seen: Tokens of the micro-batches taken so far, padding excluded.
        trained_tokens: Of those, the tokens whose prediction carried loss.
    """

    tokens_seen: int = 0
    trained_tokens: int = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take one optimizer step's micro-batches, counting their tokens."""
        samples, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        for batch in samples:
            mask = batch.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                self.tokens_seen += int(mask.sum())
            else:
                self.tokens_seen += int(batch["input_ids"].numel())
            # The first token of a row is never predicted, whatever its label says.
            self.trained_tokens += int((batch["labels"][..., 1:] != -100).sum())
        return samples, items
