"""``model.generate`` in a thread that ends when asked to."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_kit.boundaries import describe_cause, is_foreign
from qlora_kit.device import fork_generators
from qlora_kit.errors import ConfigError, EngineError, QloraKitError

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Worker", "translate_error"]


class Worker:
    """``model.generate`` in a thread that ends when asked to."""

    _END = object()

    def __init__(
        self, module: Any, ids: list[int], config: GenerationConfig, seed: int | None
    ) -> None:
        self._module, self._ids, self._config, self._seed = module, ids, config, seed
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qlora_kit-generate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tokens(self) -> Iterator[int]:
        """New token ids as they come.

        Raises:
            Exception: Whatever ``generate`` raised in the thread.
        """
        while True:
            item = self._queue.get()
            if item is self._END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End generation after the token in hand and wait for the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        import torch

        try:
            with contextlib.ExitStack() as stack:
                if self._seed is not None:
                    stack.enter_context(fork_generators())
                    torch.manual_seed(self._seed)
                self._generate()
        # Not swallowed: raised again where the chunks are read.
        except BaseException as error:  # noqa: BLE001
            self._queue.put(translate_error(error))
        finally:
            self._queue.put(self._END)

    def _generate(self) -> None:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList
        from transformers.generation import BaseStreamer

        tokens, stopped, prompt_length = self._queue, self._stopped, len(self._ids)

        class Streamer(BaseStreamer):
            def __init__(self) -> None:
                self.left = prompt_length

            def put(self, value: Any) -> None:
                for token in value.flatten().tolist():
                    # generate() streams the prompt first.
                    if self.left > 0:
                        self.left -= 1
                    else:
                        tokens.put(token)

            def end(self) -> None:
                pass

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        device = self._module.get_input_embeddings().weight.device
        input_ids = torch.tensor([self._ids], device=device)  # (1, T)
        self._module.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=self._config,
            streamer=Streamer(),
            stopping_criteria=StoppingCriteriaList([Stopped()]),
        )


def translate_error(error: BaseException) -> BaseException:
    """What transformers trips over is about settings; what fails while computing is not."""
    if isinstance(error, QloraKitError) or not is_foreign(error):
        return error
    translated: QloraKitError
    if isinstance(error, RuntimeError | MemoryError):
        translated = EngineError(
            f"Generating failed: {describe_cause(error)} Where memory is short, ask for fewer "
            "tokens or give a shorter prompt."
        )
    else:
        translated = ConfigError(
            f"transformers cannot generate with these settings: {describe_cause(error)}"
        )
    translated.__cause__ = error
    return translated
