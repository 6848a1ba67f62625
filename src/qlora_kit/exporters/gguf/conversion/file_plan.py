"""What a conversion will write: names, shapes and types, before a weight is read.

This module puts families, tensors and types together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Final

from qlora_kit.errors import ConfigError
from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor, plan_tensors
from qlora_kit.exporters.gguf.conversion.text_model import TextSource
from qlora_kit.exporters.gguf.families.table import Config, Description, Family, read_family
from qlora_kit.exporters.gguf.quantization.ggml import check_encoder, row_size
from qlora_kit.exporters.gguf.quantization.mixtures import (
    ModelShape,
    allows_quantization,
    choose_types,
    find_unweighted,
)
from qlora_kit.exporters.gguf.quantization.recipes import Recipe, resolve_recipes
from qlora_kit.exporters.gguf.quantization.type_requests import TypeRequests
from qlora_kit.messages import Setting
from qlora_kit.weights.source import TensorSource

__all__ = [
    "FilePart",
    "FileSettings",
    "Plan",
    "count_tensor_bytes",
    "pad",
    "plan_conversion",
    "round_up",
]

# GGUF_DEFAULT_ALIGNMENT of gguf.h, in bytes; a file could state another in general.alignment.
_ALIGNMENT: Final = 32


@dataclass(frozen=True)
class FileSettings:
    """How files are to be written, besides the names of their quantizations.

    Attributes:
        requests: Types that the user asked for by tensor.
        is_guided: Whether the importance of a tensor's columns is known, or will be, by its name;
            ``None`` without an importance matrix.
        part_bytes: Largest data of one file; ``None`` puts everything into one.
        chosen: Every tensor's type, by the name of the recipe whose types were measured.
    """

    requests: TypeRequests = field(default_factory=TypeRequests)
    is_guided: Callable[[str], bool] | None = None
    part_bytes: int | None = None
    chosen: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class FilePart:
    """One of the files that a model is split into, or the only one.

    Attributes:
        name: What it is called.
        tensors: The tensors in it, in order.
    """

    name: str
    tensors: list[PlannedTensor]


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
        settings: How they are to be written.
        notes: What the user should know, one sentence each.
    """

    family: Family
    config: Config
    description: Description
    tensors: list[PlannedTensor]
    recipes: list[Recipe]
    types: Mapping[str, Mapping[str, str]]
    name: str
    settings: FileSettings = field(default_factory=FileSettings)
    notes: tuple[str, ...] = ()

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
        return self.parts(recipe)[0].name

    def parts(self, recipe: Recipe) -> list[FilePart]:
        """The files of a recipe, as ``llama-gguf-split`` cuts and calls them."""
        stem = f"{self.name}.{recipe.name.upper()}"
        limit, types = self.settings.part_bytes, self.types[recipe.name]
        groups: list[list[PlannedTensor]] = [[]]
        size = 0
        for tensor in self.tensors:
            own = round_up(count_tensor_bytes(tensor.shape, types[tensor.name]))
            if limit is not None and groups[-1] and size + own > limit:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += own
        count = len(groups)
        if count == 1:
            return [FilePart(f"{stem}.gguf", groups[0])]
        return [
            FilePart(f"{stem}-{number:05}-of-{count:05}.gguf", group)
            for number, group in enumerate(groups, start=1)
        ]


def plan_conversion(
    source: TensorSource,
    config: Mapping[str, Any],
    *,
    quantization: str | Iterable[str] = "q8_0",
    name: str = "model",
    settings: FileSettings | None = None,
) -> Plan:
    """Decide names, shapes and types, reading no weight.

    Raises:
        ConfigError: When a quantization is unknown, does not fit the model or needs an importance
            matrix.
        MissingDependencyError: When it cannot be encoded with what is installed.
        UnsupportedModelError: When the model is of a kind that llama.cpp runs differently.
    """
    recipes = resolve_recipes(quantization)
    settings = settings or FileSettings()
    has_importance = settings.is_guided is not None
    family, wrapped = read_family(config)
    check_encoder({recipe.base_type for recipe in recipes}, has_importance=has_importance)
    description = family.describe_model(wrapped)
    text = TextSource(source)
    if family.read_values is not None:
        family.read_values(text, wrapped, description)
    tensors = [text.plan(one) for one in plan_tensors(text, family, wrapped, description)]
    if text.left_out:
        description.notes.append(
            f"The file holds the text model alone: {len(text.left_out)} tensors of what sees or "
            f"hears are left out, such as {text.left_out[0]}."
        )
    shape = _describe_shape(family, wrapped, description)
    shapes = [(tensor.name, tensor.shape) for tensor in tensors]
    types = {
        recipe.name: dict(settings.chosen[recipe.name])
        if recipe.name in settings.chosen
        else choose_types(
            shapes, recipe, shape, has_importance=has_importance, requests=settings.requests
        )
        for recipe in recipes
    }
    check_encoder(
        {used for chosen in types.values() for used in chosen.values()},
        has_importance=has_importance,
    )
    notes = _check_settings(settings, recipes, types, dict(shapes), shape)
    return Plan(family, wrapped, description, tensors, recipes, types, name, settings, notes)


def _describe_shape(family: Family, config: Config, description: Description) -> ModelShape:
    heads = description.metadata.get("attention.head_count", config.heads)
    kv_heads = description.metadata.get("attention.head_count_kv", config.kv_heads)
    return ModelShape(
        family.architecture,
        int(description.metadata.get("block_count", config.layers)),
        # Layers may differ; llama.cpp's rules ask the first one.
        int(heads[0] if isinstance(heads, list) else heads),
        int(kv_heads[0] if isinstance(kv_heads, list) else kv_heads),
        int(description.metadata.get("expert_count", 0)),
    )


def _check_settings(
    settings: FileSettings,
    recipes: list[Recipe],
    types: Mapping[str, dict[str, str]],
    shapes: dict[str, tuple[int, ...]],
    shape: ModelShape,
) -> tuple[str, ...]:
    """Refuse what cannot be met, and say what has no effect."""
    free = [name for name, dims in shapes.items() if allows_quantization(name, dims)]
    settings.requests.check(shapes, free)
    notes = []
    plain = [recipe.name for recipe in recipes if not recipe.is_quantized]
    if settings.requests.patterns and plain:
        if len(plain) == len(recipes):
            raise ConfigError(
                f"tensor_types has no effect on {', '.join(plain)}, which stores every matrix in "
                "that type. Name a quantization beside it, such as 'q4_k_m'."
            )
        notes.append(f"tensor_types has no effect on {', '.join(plain)}.")
    guided = settings.is_guided or _knows_nothing
    for recipe in recipes:
        if recipe.name == "mxfp4_moe" and not shape.experts:
            raise ConfigError(
                "mxfp4_moe stores experts in 4 bits and everything else in q8_0; this model has "
                "no experts. Take q8_0, or iq4_nl or q4_k_m for 4 bits."
            )
        if recipe.name.startswith("tq"):
            notes.append(
                f"{recipe.name} keeps three values per weight: it is for models that were trained "
                "so, such as BitNet, and ruins others."
            )
        needed = find_unweighted(types[recipe.name], recipe, filter(guided, free))
        if needed:
            tensor, kind = needed[0]
            raise ConfigError(
                f"{recipe.name} stores {tensor} in {kind.lower()}, which is of no use without an "
                "importance matrix",
                *(
                    (" that covers it.",)
                    if settings.is_guided
                    else (": give ", Setting("imatrix", True, "export_model"), ", rows or a file.")
                ),
                advice=_name_neighbours(recipe.name),
            )
    if settings.is_guided is not None:
        left = [name for name in free if name.startswith("blk.") and not guided(name)]
        if left:
            notes.append(
                f"The importance matrix has nothing on {len(left)} of {len(free)} matrices, such "
                f"as {left[0]}; they are quantized without."
            )
    return tuple(notes)


def _knows_nothing(name: str) -> bool:
    """Without an importance matrix."""
    return False


#: The nearest type of about the same size that does without, for those that do not.
_NEIGHBOURS: Final = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "q2_k_s"), "q2_k"),
    "iq3_xxs": "iq3_s",
    "iq3_xs": "iq3_s",
}


def _name_neighbours(name: str) -> tuple[str, ...]:
    near = _NEIGHBOURS.get(name)
    return () if near is None else (f"Without one, {near} is the nearest type.",)


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
