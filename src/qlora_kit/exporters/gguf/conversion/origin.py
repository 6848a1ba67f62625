"""Where a file's model comes from: the ``general.*`` keys that say so, read from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.artifacts.model_card import find_base_name
from qlora_kit.paths import is_modelscope_name

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from qlora_kit.handles import LoadedModel

__all__ = ["Origin", "describe_size", "read_origin", "write_origin"]


@dataclass(frozen=True)
class Origin:
    """What a base says about itself.

    Attributes:
        base_name: What the base is called, without its owner.
        owner: Who published it on the hub, if it was asked for by its name there.
        license: The license's short name.
        license_name: Its full name, where the short one is ``"other"``.
        license_link: Where it can be read.
        tags: What the base's card files it under.
        languages: Languages of the base, as the card spells them.
    """

    base_name: str | None = None
    owner: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()


def read_origin(model: LoadedModel) -> Origin:
    """What the base's name and model card say.

    A fine-tuned model is under its base's license and speaks its languages; the base itself is
    named, so that a file says what it was made of.
    """
    from gguf.metadata import Metadata

    if model.base.source == "gguf":
        return Origin(Path(model.base.name_or_path).name.removesuffix(".gguf"))
    name = find_base_name(model)
    if is_modelscope_name(model.base.name_or_path):
        # Of the cached folder only the last part would be told; the owner is one of this hub.
        name = model.base.name_or_path.rpartition("/")[2]
    is_folder = Path(name).is_absolute()
    owner, _, short = name.rpartition("/")
    card: Mapping[str, Any] = Metadata.load_model_card(model.base.path) or {}
    return Origin(
        base_name=Path(name).name if is_folder else short,
        owner=None if is_folder else owner or None,
        license=", ".join(_list(card.get("license"))) or None,
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        tags=tuple(dict.fromkeys([*_list(card.get("tags")), *_list(card.get("pipeline_tag"))])),
        languages=_list(card.get("language")),
    )


def _list(value: Any) -> tuple[str, ...]:
    """A card's entry, which may be one text, several or absent."""
    values = [value] if isinstance(value, str) else value or ()
    return tuple(str(entry) for entry in values)


def describe_size(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    """``general.size_label``, such as ``"135M"`` or ``"8x7B"``.

    Args:
        tensors: GGUF names with their shapes, rows first.
    """
    import math

    from gguf import size_label

    # As GGUFWriter.get_total_parameter_count counts: one expert stands for all of its tensor.
    shared = expert = experts = stacks = 0
    for name, shape in tensors:
        size = math.prod(shape)
        if "_exps." in name and len(shape) >= 3:
            expert += size // shape[0]
            experts += shape[0]
            stacks += 1
        else:
            shared += size
    return str(size_label(shared + expert, shared, expert, experts // stacks if stacks else 0))


def write_origin(writer: GGUFWriter, origin: Origin) -> None:
    """Write the keys for what is known."""
    if origin.license:
        writer.add_license(origin.license)
    if origin.license_name:
        writer.add_license_name(str(origin.license_name))
    if origin.license_link:
        writer.add_license_link(str(origin.license_link))
    if origin.base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, origin.base_name)
        if origin.owner:
            writer.add_base_model_organization(0, origin.owner)
            # What llama.cpp's converter writes for a model of the hub.
            address = f"https://huggingface.co/{origin.owner}/{origin.base_name}"
            writer.add_base_model_repo_url(0, address)
    if origin.tags:
        writer.add_tags(list(origin.tags))
    if origin.languages:
        writer.add_languages(list(origin.languages))
