"""What a saved model remembers of its training: the formatter, through its manifest.

An adapter, a merged export, a ``.gguf`` file of an export and a checkpoint of a run are all
asked in the words they were trained with.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from qlora_kit.artifacts.files import hash_file, list_files
from qlora_kit.engines.adapter_start import write_start
from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.handles import AdaptedModel, BaseInfo, LoadedModel
from qlora_kit.manifest import MANIFEST_NAME, describe_model, read_manifest, write_manifest

__all__ = [
    "find_manifest",
    "mention_changes",
    "restore_adapter_config",
    "restore_formatter",
    "write_checkpoint_manifest",
]

logger = logging.getLogger(__name__)

#: Its configuration may be edited: it names the base.
_ADAPTER_FILES: Final = ("adapter_model.safetensors",)
_OF_A_RANK: Final = re.compile(r"rng_state_\d+\.pth|.*\.partial")

Model = TypeVar("Model", bound=LoadedModel)


def write_checkpoint_manifest(model: LoadedModel, folder: Path, run: Mapping[str, Any]) -> None:
    """Say in a checkpoint itself which base, formatter and run it belongs to, and hash its files.

    What the adapter's start took out of the base is written with it.

    The run's manifest is written when the run ends, and stays behind where a checkpoint is
    copied from. It is the last file to be written: a checkpoint that has it is whole.

    Args:
        model: What is trained.
        folder: The checkpoint.
        run: What is to be said of the run.
    """
    write_start(getattr(model, "start", None), folder)
    files = [
        file
        for file in list_files(folder)
        # Other ranks may be writing theirs.
        if file.name != MANIFEST_NAME and not _OF_A_RANK.fullmatch(file.name)
    ]
    write_manifest(folder, "checkpoint", {**describe_model(model), "run": run, "files": files})


def find_manifest(path: Path) -> dict[str, Any]:
    """The manifest that speaks of a model, or an empty dictionary.

    Args:
        path: A folder with a checkpoint or an adapter, or a ``.gguf`` file.
    """
    folder = path if path.is_dir() else path.parent
    try:
        manifest: Any = read_manifest(folder)
    except (OSError, ValueError) as error:
        logger.warning("The manifest in %s cannot be read and is ignored: %s", folder, error)
        return {}
    if not isinstance(manifest, dict):
        logger.warning("The manifest in %s is no JSON object and is ignored.", folder)
        return {}
    if path.is_file() and path.name not in _list_files(manifest):
        return {}
    return manifest


def mention_changes(folder: Path, base: BaseInfo, manifest: Mapping[str, Any]) -> None:
    """Say where an adapter, or the base it came back on, is not the one its manifest speaks of.

    Args:
        folder: The adapter.
        base: What was loaded below it.
        manifest: The one beside the adapter, or an empty dictionary.
    """
    saved = manifest.get("base")
    trained_on = saved.get("fingerprint") if isinstance(saved, Mapping) else None
    if trained_on and base.fingerprint and trained_on != base.fingerprint:
        logger.warning(
            "The base in %s is not the one that the adapter in %s was trained on: its weights are "
            "others. Answers and exports will be another model's.",
            base.path, folder,
        )  # fmt: skip
    files = manifest.get("files")
    for file in files if isinstance(files, list) else ():
        name = file.get("name") if isinstance(file, Mapping) else None
        path = folder / str(name)
        if name in _ADAPTER_FILES and path.is_file() and file.get("sha256") != hash_file(path):
            logger.warning(
                "%s is not the file that the manifest beside it lists: it was changed or replaced "
                "after it was saved.",
                path,
            )


def restore_formatter(model: Model, manifest: Mapping[str, Any]) -> Model:
    """The model with the formatter it was trained with; of a stranger's only the end token."""
    spec = manifest.get("formatter")
    if not isinstance(spec, Mapping):
        return model
    from qlora_kit.data import formatter_from_spec

    try:
        model.record.formatter = formatter_from_spec(spec, model.tokenizer)
    # A manifest that was edited by hand may hold anything.
    except (QloraKitError, TypeError, ValueError, AttributeError) as error:
        logger.warning("The formatter that the model was trained with is not here: %s", error)
        stop = model.tokenizer.get_vocab().get(str(spec.get("eos_token")))
        if stop is not None:
            ids = tuple(dict.fromkeys((*model.base.stop_token_ids, stop)))
            base = dataclasses.replace(model.base, stop_token_ids=ids)
            return dataclasses.replace(model, base=base)
    return model


def restore_adapter_config(model: AdaptedModel, manifest: Mapping[str, Any]) -> AdaptedModel:
    """The model with those settings of its adapter that peft does not save.

    How it was started, its seed and whether activations are recomputed come from the manifest
    beside it, as far as that is about this adapter.
    """
    saved = manifest.get("adapter")
    if not isinstance(saved, Mapping) or saved.get("r") != model.adapter.r:
        return model
    names = ("init_lora_weights", "random_state", "use_gradient_checkpointing")
    values = {name: saved[name] for name in names if name in saved}
    try:
        adapter = dataclasses.replace(model.adapter, **values)
    # A manifest that was edited by hand may hold anything.
    except (ConfigError, TypeError) as error:
        logger.warning("The manifest says of the adapter what cannot be: %s", error)
        return model
    return dataclasses.replace(model, adapter=adapter)


def _list_files(manifest: Mapping[str, Any]) -> set[str]:
    files = manifest.get("files")
    if not isinstance(files, list):
        return set()
    return {str(file.get("name")) for file in files if isinstance(file, Mapping)}
