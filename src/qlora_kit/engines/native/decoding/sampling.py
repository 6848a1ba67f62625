"""The next token of each answer, chosen on the device.

The scores are processed by transformers' own processors, made by the model's own method, so that
penalties and filters mean what they mean in ``generate``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["RowSampler", "choose_tokens", "is_plainly_greedy"]

#: Processors that look at scores alone, not at the tokens so far.
_OF_SCORES: Final = (
    "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
    "LogitNormalization", "InfNanRemoveLogitsProcessor", "SuppressTokensLogitsProcessor",
)  # fmt: skip


class RowSampler:
    """How one answer's tokens are chosen.

    Args:
        model: A transformers model.
        config: What was asked for; copied.
        prompt: The prompt's ids.
        device: The model's.
        seed: Makes the answer repeatable; torch's own generator is used without.

    Attributes:
        processors: transformers' processors in their order.
        reads_tokens: Whether one of them looks at the tokens so far.
        do_sample: Whether tokens are drawn.
        generator: The source of random numbers, if it is the answer's own.
    """

    def __init__(
        self, model: Any, config: Any, prompt: Sequence[int], device: torch.device, seed: int | None
    ) -> None:
        config = copy.deepcopy(config)
        config.max_length = len(prompt) + config.max_new_tokens
        model._prepare_special_tokens(config, True, device=device)
        self.processors: Any = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([list(prompt)], device=device),
            device=device,
        )
        self.reads_tokens = any(type(p).__name__ not in _OF_SCORES for p in self.processors)
        self.do_sample: bool = config.do_sample
        self.generator: torch.Generator | None = None
        if self.do_sample and seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, scores: Tensor) -> Tensor:
        """Tokens for processed scores of shape ``(B, V)``, shape ``(B,)``."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        chances = torch.softmax(scores, dim=-1)
        return torch.multinomial(chances, 1, generator=self.generator)[:, 0]


def is_plainly_greedy(sampler: RowSampler) -> bool:
    """Whether the most likely token is taken as it is."""
    return not sampler.do_sample and not sampler.processors


def choose_tokens(
    logits: Tensor, samplers: Sequence[RowSampler | None], histories: Sequence[Tensor | None]
) -> Tensor:
    """The next token of each row.

    Args:
        logits: Shape ``(B, V)``, in the model's dtype.
        samplers: One per row; ``None`` where nobody waits for the token.
        histories: Each row's tokens so far, shape ``(1, L)``, where its processors read them.

    Returns:
        int64, shape ``(B,)``.
    """
    asked = [sampler for sampler in samplers if sampler is not None]
    # float32, as transformers' generate processes them.
    scores = logits.float()
    if asked and not any(s.reads_tokens or s.generator is not None for s in asked):
        # Alike for every row: all answers of one call share their settings.
        return asked[0].draw(asked[0].processors(None, scores))
    tokens = torch.zeros(len(samplers), dtype=torch.int64, device=logits.device)
    for row, (sampler, history) in enumerate(zip(samplers, histories, strict=True)):
        if sampler is not None:
            processed = sampler.processors(history, scores[row : row + 1])
            tokens[row : row + 1] = sampler.draw(processed)
    return tokens
