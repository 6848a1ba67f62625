"""Types that a user asks for by tensor, as ``llama-quantize --tensor-type`` takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from qlora_kit.errors import ConfigError, did_you_mean
from qlora_kit.exporters.gguf.quantization.recipes import BLOCK_SIZES, Recipe

__all__ = ["TypeRequests", "parse_requests"]

_SPELLINGS: Final = {name.lower(): name for name in BLOCK_SIZES}


@dataclass(frozen=True)
class TypeRequests:
    """What a user wants stored how.

    Attributes:
        patterns: Regular expressions, searched for in a tensor's name, each with a type; the
            first one that is found counts.
        output: The type of the output matrix, and of embeddings that are tied to it.
        embeddings: The type of the token embeddings.
    """

    patterns: tuple[tuple[str, str], ...] = ()
    output: str | None = None
    embeddings: str | None = None

    def find(self, name: str) -> str | None:
        """The type asked for a tensor by pattern, if any."""
        return next((kind for pattern, kind in self.patterns if _matches(pattern, name)), None)

    def over(self, recipe: Recipe) -> TypeRequests:
        """These requests, and what a recipe's own name asks for where they say nothing."""
        return replace(
            self,
            output=self.output or recipe.output_type,
            embeddings=self.embeddings or recipe.embedding_type,
        )

    def check(self, tensors: Mapping[str, tuple[int, ...]], free: Iterable[str]) -> None:
        """Refuse requests that change nothing, or cannot be met.

        Args:
            tensors: Shapes of the file's tensors, rows first.
            free: Names of those that are quantized at all.

        Raises:
            ConfigError: Names the request and what there is.
        """
        names = list(free)
        for pattern, asked in self.patterns:
            if not any(_matches(pattern, name) for name in names):
                parts = sorted({re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in names})
                raise ConfigError(
                    f"tensor_types: {pattern!r} ({asked.lower()}) is found in no name of a matrix "
                    f"that is quantized. There are {', '.join(parts)}; of one layer, "
                    "'blk.0.ffn_down' for example."
                )
        tables = (
            ("output_type", self.output, "output.weight"),
            ("embedding_type", self.embeddings, "token_embd.weight"),
        )
        for option, kind, own in tables:
            name = own if own in tensors else "token_embd.weight"
            if kind is not None and tensors[name][-1] % BLOCK_SIZES[kind] != 0:
                raise ConfigError(
                    f"{option}={kind.lower()!r} has blocks of {BLOCK_SIZES[kind]} numbers, and a "
                    f"row of {name} has {tensors[name][-1]}. Take q8_0, f16 or another type with "
                    "smaller blocks."
                )


def _matches(pattern: str, name: str) -> bool:
    return re.search(pattern, name, re.IGNORECASE) is not None


def parse_requests(
    tensor_types: Mapping[str, str] | None, output_type: str | None, embedding_type: str | None
) -> TypeRequests:
    """Read what a user wrote.

    Raises:
        ConfigError: When a type or a pattern is none.
    """
    patterns = []
    for pattern, kind in (tensor_types or {}).items():
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ConfigError(
                f"tensor_types: {pattern!r} is no regular expression: {error}."
            ) from error
        patterns.append((str(pattern), _parse_type(kind, f"tensor_types[{pattern!r}]")))
    return TypeRequests(
        tuple(patterns),
        None if output_type is None else _parse_type(output_type, "output_type"),
        None if embedding_type is None else _parse_type(embedding_type, "embedding_type"),
    )


def _parse_type(kind: object, option: str) -> str:
    key = str(kind).lower()
    if key not in _SPELLINGS:
        raise ConfigError(
            f"{option} is {kind!r}, which is no type of ggml.{did_you_mean(key, _SPELLINGS)} "
            f"Known: {', '.join(_SPELLINGS)}."
        )
    return _SPELLINGS[key]
