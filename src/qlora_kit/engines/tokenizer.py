"""The tokenizer beside a checkpoint, with its padding and stop tokens settled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause
from qlora_kit.engines.tokenizer_file import match_with_file
from qlora_kit.errors import ModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

logger = logging.getLogger(__name__)

#: Tokens that model families reserve for padding, tried in this order.
_PADDING_TOKENS: Final = (
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|endoftext|>",
    "<unk>",
)

#: Ids that may stand unused: many for each token that there is, and some whatever there is.
_MOST_IDS_PER_TOKEN: Final = 10
_MOST_IDS_FREE: Final = 1_000_000


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, model_config: Any = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; padding on the right, with a token of its own if there is one.

    Args:
        folder: Where it lies.
        trust_remote_code: Run Python code that the folder ships.
        model_config: The model's configuration, where the folder is not the model's.

    Raises:
        ModelNotFoundError: When the folder has no tokenizer that can be loaded.
        UnsupportedModelError: When transformers cannot be brought to read it as its file says.
    """
    from transformers import AutoTokenizer

    _check_ids(folder / "tokenizer.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **({} if model_config is None else {"config": model_config}),
        )
    # The tokenizers library raises bare Exceptions, and transformers what its files make it do.
    except Exception as error:
        raise ModelNotFoundError(
            f"{folder} has no tokenizer that transformers can load "
            f"({describe_cause(error).rstrip('.')}). Copy tokenizer.json and "
            "tokenizer_config.json of the model into it."
        ) from error
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    # Some classes make an empty tokenizer where there is no file.
    if not trust_remote_code and not any((folder / name).is_file() for name in names):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer: there is none of {', '.join(sorted(names))}. Copy "
            "tokenizer.json and tokenizer_config.json of the model into it."
        )
    if not trust_remote_code or type(tokenizer).__module__.startswith("transformers."):
        tokenizer = match_with_file(tokenizer, folder)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _choose_pad_token(tokenizer)
        logger.info("The tokenizer names no padding token; using %r.", tokenizer.pad_token)
    return tokenizer


def _check_ids(file: Path) -> None:
    """Refuse ids far beyond the vocabulary: a table as long as the largest would be made."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [len(vocabulary)]
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        largest = max(ids, default=0)
    # A file that is absent, or no tokenizer, is told of by whoever loads it.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if largest > _MOST_IDS_PER_TOKEN * (len(ids) + len(vocabulary)) + _MOST_IDS_FREE:
        raise ModelNotFoundError(
            f"{file} is damaged: it gives a token the id {largest:,}, with {len(vocabulary):,} "
            "tokens in all. Download it again."
        )


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    vocabulary = tokenizer.get_vocab()
    for token in _PADDING_TOKENS:
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    # Safe here: labels say what carries loss, so an end token that is padding still trains.
    eos: str | None = tokenizer.eos_token
    return eos
