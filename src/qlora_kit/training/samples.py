"""The same prompts asked before, during and after a training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from qlora_kit.engines.contract import ready_to_generate
from qlora_kit.errors import ConfigError
from qlora_kit.handles import AdaptedModel
from qlora_kit.results import Sample

__all__ = ["SampleAsker"]

logger = logging.getLogger(__name__)

#: Tokens of an answer: enough to see what it is, and few to wait for.
_MOST_TOKENS = 64


class SampleAsker(TrainerCallback):
    """Asks and keeps the answers; greedy, so that training draws the same random numbers.

    Args:
        model: What is trained.
        formatter: What makes prompts of texts, as training does.
        prompts: The texts.
        every: After how many steps each; ``None`` for before and after only.
    """

    def __init__(
        self, model: AdaptedModel, formatter: Any, prompts: Sequence[str], every: int | None
    ) -> None:
        if prompts and not hasattr(formatter, "prompt"):
            raise ConfigError(
                "sample_prompts are asked in the formatter's words, and these rows were trained "
                "without one."
            )
        self._model, self._every = model, every
        self._prompts = [(text, formatter.prompt(text)) for text in prompts]
        self.samples: list[Sample] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every and state.global_step % self._every == 0:
            self.ask(state.global_step)

    def ask(self, step: int) -> None:
        """Ask every prompt once for a step."""
        if not self._prompts or any(sample.step == step for sample in self.samples):
            return
        import torch

        tokenizer = self._model.tokenizer
        was_training = self._model.model.training
        with ready_to_generate(self._model) as ready, torch.no_grad():
            model: Any = ready
            device = next(model.parameters()).device
            for text, prompt in self._prompts:
                ids = torch.tensor([list(prompt.token_ids)], device=device)
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=_MOST_TOKENS,
                    do_sample=False,
                    eos_token_id=list(self._model.stop_token_ids),
                    pad_token_id=tokenizer.pad_token_id,
                )
                answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                self.samples.append(Sample(step, text, answer.strip()))
                logger.info("After %d steps: %r -> %r", step, text, answer.strip())
        self._model.model.train(was_training)
