"""The tokenizer's files in an export: those it came from, with what changed since.

``save_pretrained`` alone writes them anew: the class becomes one that older transformers and
llama.cpp's converter do not know, fields it has no use for are lost, and how it was loaded is
added. What nobody changed is therefore left as the base's makers wrote it.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.engines.tokenizer import load_tokenizer
from qlora_kit.engines.tokenizer_file import find_differing_text
from qlora_kit.errors import QloraKitError
from qlora_kit.handles import LoadedModel
from qlora_kit.private_folders import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["write_tokenizer"]

logger = logging.getLogger(__name__)

_CONFIG: Final = "tokenizer_config.json"
_JSON: Final = "tokenizer.json"
_TEMPLATE: Final = "chat_template.jinja"
#: Vocabulary files that other tools read and save_pretrained leaves out.
_VOCABULARY_FILES: Final = ("tokenizer.model", "vocab.json", "merges.txt")

#: How a tokenizer was loaded, which transformers 5.17 saves with it.
_LOADING: Final = ("is_local", "local_files_only", "token", "cache_dir", "revision", "subfolder")
#: Known to every transformers; it reads tokenizer.json as it is.
_PLAIN_CLASS: Final = "PreTrainedTokenizerFast"


def write_tokenizer(model: LoadedModel, folder: Path) -> None:
    """Write the tokenizer with its chat template, and the vocabulary files it came from.

    Args:
        model: The live model.
        folder: Where to write; a ``config.json`` that is to be there is there already.
    """
    tokenizer = model.tokenizer
    source = _find_source(model)
    tokenizer.save_pretrained(str(folder))
    written = _read_config(folder)
    config = {key: value for key, value in written.items() if key not in _LOADING}
    if (source / _CONFIG).is_file():
        config = _keep_what_is_unchanged(model, source, folder, config)
    for name in _VOCABULARY_FILES:
        for origin in (source / name, model.base.path / name):
            if origin.is_file() and not (folder / name).exists():
                shutil.copy2(origin, folder / name)
    _write_with_a_class_that_reads_it(tokenizer, folder, config, written.get("tokenizer_class"))


def _find_source(model: LoadedModel) -> Path:
    """The folder that the tokenizer was read from: the adapter's, or the base's."""
    named = Path(model.tokenizer.name_or_path or model.base.path)
    return named if (named / _CONFIG).is_file() else model.base.path


def _keep_what_is_unchanged(
    model: LoadedModel, source: Path, folder: Path, config: dict[str, Any]
) -> dict[str, Any]:
    """The source's configuration with what the live tokenizer has otherwise, and its vocabulary."""
    try:
        original = load_tokenizer(source, trust_remote_code=model.config.trust_remote_code)
    except QloraKitError as error:
        logger.warning("The tokenizer in %s cannot be read any more: %s", source, error)
        return config
    with scratch_folder("tokenizer") as scratch:
        original.save_pretrained(str(scratch))
        before = _read_config(scratch)
        is_same = _read(folder / _JSON) == _read(scratch / _JSON)
    kept = {key: value for key, value in _read_config(source).items() if key not in _LOADING}
    changed = {key: value for key, value in config.items() if before.get(key) != value}
    # Chosen on loading where the base names none; other tools have to be told.
    if not kept.get("pad_token") and config.get("pad_token"):
        changed["pad_token"] = config["pad_token"]
    for key in before.keys() - config.keys():
        kept.pop(key, None)
    kept |= changed
    if "chat_template" in kept and kept["chat_template"] != model.tokenizer.chat_template:
        # The file beside it says it all.
        kept.pop("chat_template")
    if is_same and (source / _JSON).is_file():
        shutil.copyfile(source / _JSON, folder / _JSON)
    elif not is_same and "added_tokens_decoder" in kept:
        kept["added_tokens_decoder"] = {
            str(index): token.__getstate__()
            for index, token in model.tokenizer.added_tokens_decoder.items()
        }
    return kept


def _write_with_a_class_that_reads_it(
    tokenizer: PreTrainedTokenizerBase, folder: Path, config: dict[str, Any], written: Any
) -> None:
    """Write the configuration with the first class by which transformers gives the live ids.

    The class that the base declares, one that every transformers knows, what transformers wrote.
    """
    declared = config.get("tokenizer_class")
    for name in dict.fromkeys((declared, _PLAIN_CLASS, written)):
        _write_config(folder, {**config, "tokenizer_class": name})
        text = _find_text_read_otherwise(tokenizer, folder)
        if text is None:
            if name != declared:
                logger.warning(
                    "tokenizer_config.json says %s, where the base said %s: by that transformers "
                    "reads the tokenizer's file in another way.", name, declared,
                )  # fmt: skip
            return
    _write_config(folder, config)


def _find_text_read_otherwise(tokenizer: Any, folder: Path) -> str | None:
    """A text that transformers makes other ids of than the live tokenizer does."""
    from transformers import AutoTokenizer

    if getattr(tokenizer, "_auto_map", None) is not None:
        return None  # code of the base's own, which is not run to look
    try:
        again: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 - whatever a class makes of files not its own
        return f"({error})"
    return find_differing_text(again, tokenizer)


def _read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    return content


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    stated = {key: value for key, value in config.items() if key != "tokenizer_class" or value}
    text = json.dumps(stated, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
