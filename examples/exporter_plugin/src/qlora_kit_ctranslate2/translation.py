"""The formatter ``translation``: sentences and their translations, for an engine made for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from qlora_kit import FormatterBase, Segment
from qlora_kit.errors import ConfigError

__all__ = ["TranslationFormatter"]


class TranslationFormatter(FormatterBase):
    """Formats rows of a ``source`` and its ``target``.

    Args:
        tokenizer: The model's tokenizer.
        language: The name of the language that is translated into, as the prompt says it.
        **options: The arguments of every formatter.
    """

    name = "translation"
    roles = ("source", "target")

    def __init__(self, tokenizer: Any, *, language: str = "English", **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if not language.strip():
            raise ConfigError("language is empty; name the language that is translated into.")
        self.language = language

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The source, the language, and the translation, which is learned."""
        return [
            Segment(f"{row['source']}\n\n{self.language}: "),
            Segment(row["target"], is_trained=True),
        ]

    def template_spec(self) -> dict[str, Any]:
        """What manifests keep; the language is part of it."""
        return super().template_spec() | {"language": self.language}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: Any) -> Self:
        """The formatter whose ``template_spec()`` this was."""
        return cls(tokenizer, language=spec["language"], **cls.read_common(spec))
