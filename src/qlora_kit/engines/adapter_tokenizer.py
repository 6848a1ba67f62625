"""The tokenizer beside a saved adapter, which is the one it was trained with.

TRL, axolotl, LLaMA-Factory and Unsloth save it there, with the tokens, the chat template and the
end token that their users gave it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.engines.peft_model import settle_stop_tokens
from qlora_kit.engines.tokenizer import load_tokenizer
from qlora_kit.errors import ModelNotFoundError, UnsupportedModelError
from qlora_kit.handles import AdaptedModel, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["adopt_tokenizer", "check_vocabulary"]

logger = logging.getLogger(__name__)

#: Any of them says that a tokenizer was saved.
_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def adopt_tokenizer(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """The base with the tokenizer of an adapter's folder, where that has one of its own.

    Args:
        loaded: The base of the adapter.
        folder: The adapter's folder.

    Raises:
        ModelNotFoundError: When files of a tokenizer are there and none can be loaded from them.
        UnsupportedModelError: When transformers cannot be brought to read it as its file says.
    """
    found = [name for name in _FILES if (folder / name).is_file()]
    if not found:
        return loaded
    try:
        own = load_tokenizer(
            folder,
            trust_remote_code=loaded.config.trust_remote_code,
            model_config=getattr(loaded.model, "config", None),
        )
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error} The adapter was saved with a tokenizer, of which {', '.join(found)} is left; "
            "without these files the base's own would be used."
        ) from error
    differences = _describe_differences(own, loaded.tokenizer)
    if not differences:
        # The same, and the base's own stays what exports copy.
        return loaded
    logger.info(
        "The tokenizer beside the adapter in %s is used; its base has another %s.",
        folder, ", another ".join(differences),
    )  # fmt: skip
    stops = settle_stop_tokens(loaded.model, own)
    base = dataclasses.replace(loaded.base, stop_token_ids=stops)
    return dataclasses.replace(loaded, tokenizer=own, base=base)


def check_vocabulary(adapted: AdaptedModel, base: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer whose tokens the adapted model has no embeddings of its own for.

    Args:
        adapted: The model with the adapter and the tokenizer beside it.
        base: The base's tokenizer.
        folder: The adapter's folder.

    Raises:
        UnsupportedModelError: Names the token.
    """
    own = adapted.tokenizer
    if own is base:
        return
    ids, known = own.get_vocab(), base.get_vocab()
    embedding = adapted.model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    beyond = sorted(
        (index, token)
        for token, index in ids.items()
        if index >= rows and known.get(token) != index
    )
    if beyond:
        index, token = beyond[0]
        raise UnsupportedModelError(
            f"The tokenizer beside the adapter in {folder} has {len(beyond)} tokens that the model "
            f"has no embedding for, such as {token!r}, token {index} of {rows}: they were added "
            "for training, and their embeddings were not saved. Save the adapter again with "
            "model.save_pretrained(folder, save_embedding_layers=True)."
        )
    if _brings_embeddings(adapted, embedding):
        return
    moved = sorted(
        (index, token) for token, index in ids.items() if known.get(token, index) != index
    )
    if moved:
        index, token = moved[0]
        raise UnsupportedModelError(
            f"The tokenizer beside the adapter in {folder} numbers tokens otherwise than that of "
            f"{adapted.base.name_or_path}: {token!r} is token {index} there and {known[token]} in "
            "the base, whose embeddings the adapter uses. It belongs to another base, or was "
            "copied from another model."
        )


def _brings_embeddings(adapted: AdaptedModel, embedding: Any) -> bool:
    """Whether the rows of the tokens came with the adapter."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(embedding, ModulesToSaveWrapper):
        return True
    names = [name for name, module in adapted.model.named_modules() if module is embedding]
    return any(
        carried.startswith(f"{name}.") for name in names for carried in adapted.carried_tensors
    )


def _describe_differences(own: Any, base: Any) -> list[str]:
    """What two tokenizers differ in, in words."""
    differing = {
        "vocabulary": own.get_vocab() != base.get_vocab(),
        "chat template": own.chat_template != base.chat_template,
        "end token": own.eos_token_id != base.eos_token_id,
        "padding token": own.pad_token_id != base.pad_token_id,
        "set of special tokens": own.special_tokens_map != base.special_tokens_map,
        "way of splitting text": _read_rules(own) != _read_rules(base),
    }
    return [what for what, differs in differing.items() if differs]


def _read_rules(tokenizer: Any) -> Any:
    """How a tokenizer splits texts; how it pads and cuts them is set for each call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer), getattr(tokenizer, "vocab_file", None)
    return {**json.loads(backend.to_str()), "padding": None, "truncation": None}
