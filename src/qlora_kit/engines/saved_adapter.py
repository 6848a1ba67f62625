"""An adapter's folder against the base it is put on: every tensor finds its place, or is named.

peft builds the adapter that ``adapter_config.json`` describes, fills it with what the file has
under the names it built, and says nothing of the rest. A vocabulary that was resized before
training is resized here from the rows that were saved.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["find_carried", "read_weights", "refuse_misplaced", "resize_vocabulary"]

logger = logging.getLogger(__name__)

_ADAPTER: Final = "default"
_PREFIX: Final = "base_model.model."
_LAYER: Final = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")

#: Factors of low rank that have a row, or a column, for every token: how their names end, and
#: which axis it is.
_FACTORS: Final = {".lora_embedding_A": 1, ".lora_B.weight": 0}


def read_weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the names in its file, as peft maps them for this base.

    Args:
        folder: Where peft saved it.
        model: The base, in memory.
    """
    from peft.utils.save_and_load import load_peft_weights

    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    weights: dict[str, torch.Tensor] = load_peft_weights(
        str(folder), device="cpu", key_mapping=mapping or None
    )
    return weights


def resize_vocabulary(
    model: Any, weights: Mapping[str, torch.Tensor], config: Any, folder: Path
) -> None:
    """Give the base as many token embeddings as were saved with the adapter.

    What the new rows hold is in the adapter's file, or the adapter is refused.

    Args:
        model: The base, in memory; changed in place.
        weights: The adapter's tensors.
        config: Its ``LoraConfig``, which names the tokens that were trained alone.
        folder: Where they are from.

    Raises:
        UnsupportedModelError: When the vocabulary was resized and the rows were not saved.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is None or head.weight is embedding.weight
    modules = (embedding,) if head is None else (embedding, head)
    now = int(embedding.weight.shape[0])
    saved = {m: _count_saved_rows(weights, names[m]) for m in modules}
    implied = {m: _count_implied_rows(weights, names[m]) for m in modules}
    counts = {rows for rows in (*saved.values(), *implied.values()) if rows is not None}
    if counts <= {now}:
        return
    if len(counts) > 1:
        listed = " and for ".join(map(str, sorted(counts)))
        raise UnsupportedModelError(
            f"The adapter in {folder} has embeddings for {listed} tokens, which no model has at "
            "once. Save it again from the model it was trained on."
        )
    (rows,) = counts
    new_rows = set(range(now, rows))
    lacking = [
        names[m]
        for m in modules
        if saved[m] is None and not new_rows <= _find_token_rows(config, names[m])
    ]
    if len(lacking) == len(modules) or (lacking and not is_tied):
        raise UnsupportedModelError(
            f"The adapter in {folder} was trained with {rows} token embeddings, the base has "
            f"{now}, and the file does not hold those of {lacking[0]}. Save it again with "
            "model.save_pretrained(folder, save_embedding_layers=True), or resize the base and "
            "save it as a checkpoint of its own."
        )
    logger.info("The adapter was trained with %d token embeddings instead of %d.", rows, now)
    # The new rows are overwritten by the saved ones.
    model.resize_token_embeddings(rows, mean_resizing=False)


def refuse_misplaced(
    model: Any, weights: Mapping[str, torch.Tensor], folder: Path, base: str
) -> None:
    """Refuse tensors of an adapter's file that nothing takes, and a file that lacks some.

    Args:
        model: The base with the adapter on it.
        weights: The adapter's tensors.
        folder: Where they are from.
        base: The base's name.

    Raises:
        UnsupportedModelError: Names the first.
    """
    from peft import set_peft_model_state_dict

    # What was loaded is loaded once more: only this function of peft says what found no place.
    found = set_peft_model_state_dict(model, dict(weights), adapter_name=_ADAPTER)
    names = [_plain_name(name) for name in found.unexpected_keys]
    homeless = [name for name in names if not _is_repeated(name, weights)]
    # peft alone would go on with random numbers for them.
    shared = _find_shared_rows(model)
    missing = [
        name
        for name in found.missing_keys
        if _plain_name(name) != name and not name.startswith(shared)
    ]
    if missing:
        others = f", and holds others, such as {homeless[0]}" if homeless else ""
        raise UnsupportedModelError(
            f"The adapter in {folder} does not fit {base}: it lacks {len(missing)} tensors that "
            f"its adapter_config.json asks for, such as {_plain_name(missing[0])}{others}. Load it "
            "on the base it was trained on, or copy the adapter again."
        )
    if not homeless:
        return
    name = homeless[0]
    layer = _LAYER.search(name)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layer is not None and count is not None and int(layer[1]) >= count:
        why = f": the base has layers 0 to {count - 1}. Load it on the base it was trained on"
    else:
        why = (
            f". Compare target_modules and modules_to_save in {folder / 'adapter_config.json'} "
            "with those that it was trained with"
        )
    raise UnsupportedModelError(
        f"{len(homeless)} of the {len(weights)} tensors of the adapter in {folder} have no place "
        f"in {base}, such as {name}{why}; without them it would not answer as it was trained."
    )


def _find_shared_rows(model: Any) -> tuple[str, ...]:
    """Beginnings of names that peft saves under the embedding they are tied to only."""
    return tuple(
        f"{name}.token_adapter."
        for name, module in model.named_modules()
        if getattr(getattr(module, "token_adapter", None), "tied_adapter", None) is not None
    )


def find_carried(model: Any, weights: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Names of the base's own tensors that an adapter's file brought along, and replaced.

    Args:
        model: The base with the adapter on it.
        weights: The adapter's tensors.

    Returns:
        Names as in the file, for example of the embeddings of a resized vocabulary.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    state = model.state_dict()
    return tuple(name for name in weights if name not in own and name in state)


def _count_saved_rows(weights: Mapping[str, torch.Tensor], module: str) -> int | None:
    """Rows of a module that was saved whole, under whichever of peft's wrappers."""
    start = f"{_PREFIX}{module}."
    for name, tensor in weights.items():
        if name.startswith(start) and name.endswith(".weight") and ".lora_" not in name:
            return int(tensor.shape[0])
    return None


def _find_token_rows(config: Any, module: str) -> set[int]:
    """Rows of a module that the adapter trains, and saves, one by one."""
    indices = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(indices, Mapping):
        indices = {"embed_tokens": indices}
    return {
        index
        for name, rows in indices.items()
        if f".{module}".endswith(f".{name}")
        for index in rows
    }


def _count_implied_rows(weights: Mapping[str, torch.Tensor], module: str) -> int | None:
    """Rows that a module had when it was adapted."""
    for end, axis in _FACTORS.items():
        tensor = weights.get(f"{_PREFIX}{module}{end}")
        if tensor is not None:
            return int(tensor.shape[axis])
    return None


def _is_repeated(name: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is there again under the name that peft reads; peft writes both."""
    import torch

    again = name.replace(".modules_to_save.", ".")
    both = again != name and again in weights and name in weights
    return both and torch.equal(weights[name], weights[again])


def _plain_name(name: str) -> str:
    """A tensor's name as it is in the file."""
    return name.replace(f".{_ADAPTER}.", ".").removesuffix(f".{_ADAPTER}")
