"""The tensors of a GGUF file, planned from names and shapes before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.family import Transform
from qlora_kit.exporters.gguf.families.table import Config, Description, Family
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    import torch

__all__ = ["PlannedTensor", "find_block", "find_change", "make_name_mapper", "plan_tensors"]

_Change = TypeVar("_Change")

# Rotary tables that old checkpoints store and every reader recomputes.
_DERIVED: Final = ("rotary_emb.inv_freq", "self_attn.masked_bias")

_EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
_FUSED_EXPERTS = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)")

#: What an expert's three matrices are called, by what Mixtral calls them.
_PROJECTIONS: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_FURTHER = re.compile(r"(model\.)?mtp(_\w+)?\.")

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file.

    Attributes:
        name: Its GGUF name.
        shape: Its shape, rows first.
        sources: The Hugging Face tensors it is made of; empty for computed tables.
        load: Makes it from a source.
        reorder_columns: Puts something for each of the source's inputs into the file's order, where
            that is another one.
        is_part: Whether the file has the source taken apart.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    load: Callable[[TensorSource], torch.Tensor]
    reorder_columns: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_part: bool = False


def make_name_mapper(family: Family, layers: int) -> Callable[[str], str]:
    """A function from Hugging Face names to GGUF names for one model.

    It raises :class:`UnsupportedModelError` for a name that llama.cpp has no place for.
    """
    import gguf

    numbers = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if family.architecture not in numbers:
        raise UnsupportedModelError(
            f"The installed gguf package does not know the architecture {family.architecture!r}. "
            "Update it: pip install -U 'qlora-kit[gguf]'."
        )
    table = gguf.get_tensor_name_map(numbers[family.architecture], layers)

    def to_gguf(name: str) -> str:
        mapped: str | None = _find_own_name(family, name) or table.get_name(
            name, try_suffixes=(".weight", ".bias")
        )
        module, _, kind = name.rpartition(".")
        is_known_bias = module.rpartition(".")[2] in family.biases
        if mapped is None or (kind == "bias" and not is_known_bias):
            raise UnsupportedModelError(
                f"llama.cpp has no place for the tensor {name!r} in a {family.architecture!r} "
                "model. Export with 'merged_16bit' instead."
            )
        return mapped

    return to_gguf


def _find_own_name(family: Family, name: str) -> str | None:
    """The name that the family itself gives a tensor, if any."""
    stem, _, kind = name.rpartition(".")
    number = _BLOCK.search(stem)
    block = number[1] if number else ""
    for pattern, gguf_name in family.names.items():
        if pattern.replace("{bid}", block) == stem:
            return f"{gguf_name.replace('{bid}', block)}.{kind}"
    return None


def plan_tensors(
    source: TensorSource, family: Family, config: Config, description: Description
) -> list[PlannedTensor]:
    """Every tensor of the file, in file order.

    Raises:
        UnsupportedModelError: When a tensor has no place in the file, or one is missing.
    """
    to_gguf = make_name_mapper(family, config.layers)
    unused = (*_DERIVED, *family.ignored)
    names = [name for name in source.names() if not name.endswith(unused)]
    further = _find_further_predictors(names, config.layers)
    if further:
        description.notes.append(
            f"{len(further)} tensors that predict tokens further ahead, such as {further[0]}, are "
            "left out: training leaves them as they were, and no answer depends on them."
        )
        names = [name for name in names if name not in further]
    is_tied = bool(config.get("tie_word_embeddings", family.ties_by_default))
    if is_tied:
        names = [name for name in names if name != "lm_head.weight"]
    elif "lm_head.weight" not in names:
        raise UnsupportedModelError(
            "The configuration says that the language-model head is not tied to the embeddings, "
            "and there is no lm_head.weight. Set tie_word_embeddings in config.json."
        )
    planned = [_plan_table(name, values) for name, values in description.tables.items()]
    for pattern, gguf_name in family.stacks.items():
        members = _find_members(names, pattern)
        if members:
            planned.append(_plan_stack(source, gguf_name, members))
            names = [name for name in names if name not in members]
    experts: dict[tuple[int, str], dict[int, str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name) if family.has_experts else None
        fused = _FUSED_EXPERTS.fullmatch(name) if family.has_experts else None
        split = find_change(family.splits, name)
        if split is not None:
            planned.extend(_plan_split(source, config, name, split))
        elif expert:
            key = (int(expert[1]), _PROJECTIONS.get(expert[3], expert[3]))
            experts.setdefault(key, {})[int(expert[2])] = name
        elif fused:
            planned.extend(_plan_fused_experts(source, name, int(fused[1]), fused[2]))
        else:
            planned.append(_plan_plain(source, family, config, name, to_gguf(name)))
    planned.extend(
        _plan_experts(source, layer, projection, members)
        for (layer, projection), members in experts.items()
    )
    given = {tensor.name for tensor in planned}
    planned.extend(
        _plan_filler(name, shape)
        for name, shape in description.fillers.items()
        if name not in given
    )
    _check_complete(planned, family, config)
    return sorted(planned, key=lambda tensor: _file_order(tensor.name))


def _find_further_predictors(names: list[str], layers: int) -> list[str]:
    """Tensors of a head for tokens after the next one, which transformers does not load.

    They stand apart (``mtp.``) or as blocks behind the last one, which then hold an ``eh_proj``.
    """
    numbers = {name: int(block[1]) for name in names if (block := _BLOCK.search(name))}
    blocks = {
        numbers[name]
        for name in names
        if name.endswith(".eh_proj.weight") and numbers.get(name, -1) >= layers
    }
    return [name for name in names if _FURTHER.match(name) or numbers.get(name) in blocks]


def _plan_plain(
    source: TensorSource, family: Family, config: Config, name: str, gguf_name: str
) -> PlannedTensor:
    columns = find_change(family.columns, name)
    changes = [
        change for change in (find_change(family.transforms, name), columns) if change is not None
    ]

    def load(source: TensorSource) -> torch.Tensor:
        tensor = source.load(name)
        for change in changes:
            tensor = change(tensor, config)
        return tensor

    shape = source.shape(name)
    for change in changes:
        shape = _shape_after(change, shape, config)
    reorder = None if columns is None else partial(_change, columns, config)
    return PlannedTensor(gguf_name, shape, (name,), load, reorder)


def _change(transform: Transform, config: Config, tensor: torch.Tensor) -> torch.Tensor:
    return transform(tensor, config)


def find_block(name: str) -> int:
    """The number of the block that a tensor belongs to."""
    block = _BLOCK.search(name)
    assert block is not None, name
    return int(block[1])


def find_change(changes: Mapping[str, _Change], name: str) -> _Change | None:
    """What a family does to a tensor, by the end of its name."""
    return next((change for end, change in changes.items() if name.endswith(end)), None)


def _shape_after(transform: Transform, shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    import torch

    # On the meta device nothing is computed but shapes.
    return tuple(transform(torch.empty(shape, device="meta"), config).shape)


def _plan_split(
    source: TensorSource, config: Config, name: str, parts: Mapping[str, Transform]
) -> list[PlannedTensor]:
    """One tensor of transformers that is several of llama.cpp's."""
    block = find_block(name)
    shape = source.shape(name)
    return [
        PlannedTensor(
            f"blk.{block}.{part}",
            _shape_after(cut, shape, config),
            (name,),
            lambda source, cut=cut: cut(source.load(name), config).contiguous(),  # type: ignore[misc]
            is_part=len(parts) > 1,
        )
        for part, cut in parts.items()
    ]


def _plan_table(name: str, values: list[float]) -> PlannedTensor:
    def load(source: TensorSource) -> torch.Tensor:
        import torch

        return torch.tensor(values, dtype=torch.float32)

    return PlannedTensor(name, (len(values),), (), load)


def _plan_filler(name: str, shape: tuple[int, ...]) -> PlannedTensor:
    def load(source: TensorSource) -> torch.Tensor:
        import torch

        return torch.zeros(shape, dtype=torch.float32)

    return PlannedTensor(name, shape, (), load)


def _find_members(names: list[str], pattern: str) -> tuple[str, ...]:
    """The numbered tensors of a pattern, in order."""
    before, after = pattern.split("{n}")
    numbered = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    found = {int(match[1]): name for name in names if (match := numbered.fullmatch(name))}
    if sorted(found) != list(range(len(found))):
        raise UnsupportedModelError(f"{pattern} is there for {sorted(found)} only.")
    return tuple(found[number] for number in range(len(found)))


def _plan_stack(source: TensorSource, gguf_name: str, members: tuple[str, ...]) -> PlannedTensor:
    def load(source: TensorSource) -> torch.Tensor:
        import torch

        return torch.stack([source.load(name) for name in members])

    return PlannedTensor(gguf_name, (len(members), *source.shape(members[0])), members, load)


def _expert_name(layer: int, projection: str) -> str:
    return f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight"


def _plan_experts(
    source: TensorSource, layer: int, projection: str, members: dict[int, str]
) -> PlannedTensor:
    """One matrix per expert, stacked."""
    if sorted(members) != list(range(len(members))) or projection not in (
        "gate_proj",
        "up_proj",
        "down_proj",
    ):
        raise UnsupportedModelError(
            f"Layer {layer} has no complete set of experts for {projection!r}: {sorted(members)}."
        )
    names = tuple(members[index] for index in range(len(members)))

    def load(source: TensorSource) -> torch.Tensor:
        import torch

        return torch.stack([source.load(name) for name in names])

    shape = (len(names), *source.shape(names[0]))
    return PlannedTensor(_expert_name(layer, projection), shape, names, load)


def _plan_fused_experts(
    source: TensorSource, name: str, layer: int, projection: str
) -> list[PlannedTensor]:
    """All experts in one tensor, as transformers 5 keeps them in memory."""
    # (experts, outputs, inputs). In gate_up_proj the gate's rows come first, then as many of up,
    # which llama.cpp keeps in two tensors.
    experts, rows, columns = source.shape(name)
    if projection == "down_proj":
        return [
            PlannedTensor(
                _expert_name(layer, projection),
                (experts, rows, columns),
                (name,),
                lambda source: source.load(name),
            )
        ]
    half = rows // 2
    return [
        PlannedTensor(
            _expert_name(layer, part),
            (experts, half, columns),
            (name,),
            lambda source, start=start: source.load(name)[:, start : start + half],  # type: ignore[misc]
        )
        for part, start in (("gate_proj", 0), ("up_proj", half))
    ]


def _check_complete(planned: list[PlannedTensor], family: Family, config: Config) -> None:
    names = [tensor.name for tensor in planned]
    repeated = (
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    )
    if repeated:
        raise UnsupportedModelError(f"Two tensors would both be called {sorted(repeated)[0]!r}.")
    needed = {f"{table}.weight" for table in family.tables}
    needed |= {
        f"blk.{layer}.{part}.weight"
        for layer in range(config.layers)
        for part in family.block_tensors
    }
    missing = sorted(needed - set(names))
    if missing:
        raise UnsupportedModelError(
            f"The weights are incomplete: nothing gives {missing[0]!r} ({len(missing)} tensors "
            "are missing)."
        )


def _file_order(name: str) -> tuple[int, int, str]:
    """Embeddings, blocks in order, then the rest."""
    parts = name.split(".")
    if parts[0] == "blk":
        return (1, int(parts[1]), name)
    return (0 if parts[0] == "token_embd" else 2, 0, name)
