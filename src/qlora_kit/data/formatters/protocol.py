"""What a formatter has to be, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from qlora_kit.data.tokens.encoding import EncodedExamples
    from qlora_kit.data.tokens.segments import Prompt

__all__ = ["Formatter"]


@runtime_checkable
class Formatter(Protocol):
    """What training, generation and exports ask of a formatter.

    A subclass of :class:`~qlora_kit.data.FormatterBase` has all of it for ten lines; a class of
    another origin needs nothing but these members.

    Attributes:
        tokenizer: The tokenizer whose ids it makes.
    """

    tokenizer: Any

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same rows would become other tokens or other loss."""
        ...

    def load(self, source: Any, split: str = "train") -> Sequence[Any]:
        """Read and check rows."""
        ...

    def encode(
        self,
        rows: Any,
        *,
        max_length: int,
        truncation: str = "end",
        num_proc: int | None = None,
    ) -> EncodedExamples:
        """Turn rows into ``input_ids`` and ``labels``, none longer than ``max_length`` tokens."""
        ...

    def prompt(self, *args: Any, **kwargs: Any) -> Prompt:
        """The text and ids a model is given before it answers."""
        ...

    def template_spec(self) -> dict[str, Any]:
        """The formatter as JSON values, for manifests; ``eos_token`` and ``stop`` among them."""
        ...
