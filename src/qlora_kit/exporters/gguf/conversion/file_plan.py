"""What a conversion will write: names, shapes and types, before a weight is read.

This module puts families, tensors and types together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final

from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor, plan_tensors
from qlora_kit.exporters.gguf.families.table import Config, Description, Family, find_family
from qlora_kit.exporters.gguf.quantization.ggml import check_encoder, row_size
from qlora_kit.exporters.gguf.quantization.recipes import (
    ModelShape,
    Recipe,
    choose_types,
    resolve_recipes,
)
from qlora_kit.weights.source import TensorSource

__all__ = ["Plan", "count_tensor_bytes", "pad", "plan_conversion", "round_up"]

# GGUF_DEFAULT_ALIGNMENT of gguf.h, in bytes; a file could state another in general.alignment.
_ALIGNMENT: Final = 32


@dataclass(frozen=True)
class Plan:
    """Everything about the files that can be known before a weight is read.

    Attributes:
        family: The model's family.
        config: Its configuration.
        description: Metadata, tables and notes.
        tensors: The tensors, in file order.
        recipes: The quantizations asked for.
        types: Storage type of every tensor, by recipe name and tensor name.
        name: ``general.name``.
    """

    family: Family
    config: Config
    description: Description
    tensors: list[PlannedTensor]
    recipes: list[Recipe]
    types: Mapping[str, Mapping[str, str]]
    name: str

    def data_bytes(self, recipe: Recipe) -> int:
        """Size of one file's tensor data in bytes, alignment included."""
        types = self.types[recipe.name]
        return sum(round_up(count_tensor_bytes(t.shape, types[t.name])) for t in self.tensors)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding matrix."""
        return next(t.shape[0] for t in self.tensors if t.name == "token_embd.weight")

    def file_name(self, recipe: Recipe) -> str:
        """What a recipe's file is called, for example ``model.Q8_0.gguf``."""
        return f"{self.name}.{recipe.name.upper()}.gguf"


def plan_conversion(
    source: TensorSource,
    config: Mapping[str, Any],
    *,
    quantization: str | Iterable[str] = "q8_0",
    name: str = "model",
) -> Plan:
    """Decide names, shapes and types, reading no weight.

    Raises:
        ConfigError: When a quantization is unknown.
        MissingDependencyError: When it cannot be encoded with what is installed.
        UnsupportedModelError: When the model is of a kind that llama.cpp runs differently.
    """
    recipes = resolve_recipes(quantization)
    family = find_family(config)
    check_encoder({recipe.base_type for recipe in recipes})
    wrapped = Config(config)
    description = family.describe_model(wrapped)
    tensors = plan_tensors(source, family, wrapped, description)
    shape = ModelShape(
        family.architecture,
        wrapped.layers,
        wrapped.heads,
        wrapped.kv_heads,
        int(description.metadata.get("expert_count", 0)),
    )
    shapes = [(tensor.name, tensor.shape) for tensor in tensors]
    types = {recipe.name: choose_types(shapes, recipe, shape) for recipe in recipes}
    check_encoder({used for chosen in types.values() for used in chosen.values()})
    return Plan(family, wrapped, description, tensors, recipes, types, name)


def round_up(size: int) -> int:
    """The next multiple of the file format's alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pad(handle: IO[bytes]) -> None:
    """Write zeros up to where the next tensor may begin."""
    position = handle.tell()
    handle.write(b"\0" * (round_up(position) - position))


def count_tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Size of a tensor in a file, in bytes, without what aligns it."""
    # Blocks never reach over the end of a row, so a tensor is rows times the size of one; all
    # leading dimensions (experts, for example) count as rows.
    rows = 1
    for dimension in shape[:-1]:
        rows *= dimension
    return rows * row_size(type_name, shape[-1])
