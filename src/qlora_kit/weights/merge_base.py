"""What a merge is made into: which base weights, and which 16-bit dtype."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final, Literal, get_args

from qlora_kit.errors import (
    ModelNotFoundError,
    QloraKitError,
    UnsupportedModelError,
    invalid_value,
)
from qlora_kit.handles import LoadedModel
from qlora_kit.weights.fingerprint import fingerprint_weights, stamp_files

if TYPE_CHECKING:
    import torch

__all__ = [
    "MergeBase",
    "check_base_files",
    "choose_merge_base",
    "choose_merge_dtype",
    "describe_merge_base",
    "find_changed_file",
    "find_stored_dtype",
    "is_loftq",
    "warn_of_coarse_rounding",
]

MergeBase = Literal["original", "dequantized"]
_BASES: Final = get_args(MergeBase)

logger = logging.getLogger(__name__)


def choose_merge_base(model: LoadedModel, asked: str, *, to_4bit: bool = False) -> MergeBase:
    """Settle ``"auto"``: whatever gives back the model that was trained.

    These are the weights the adapter was trained on. A merge that is rounded to 4 bits again is
    the exception: weights that sit on the 4-bit grid already swallow a small update then, which
    the original ones do not (docs/exports.md has the figures).

    Args:
        model: The live model.
        asked: ``"auto"``, ``"original"`` or ``"dequantized"``.
        to_4bit: Whether the merge will be quantized to 4 bits.

    Raises:
        ConfigError: When ``asked`` is not ``"auto"``, ``"original"`` or ``"dequantized"``.
    """
    if asked in _BASES:
        return asked  # type: ignore[return-value]
    if asked != "auto":
        raise invalid_value(
            "base", "must be 'auto', 'original' or 'dequantized'", asked, "export_model"
        )
    if model.base.quantization is None:
        return "original"
    is_on_grid = to_4bit and model.base.quantization in ("nf4", "fp4")
    has_original = not (model.base.is_prequantized or is_loftq(model))
    return "original" if is_on_grid and has_original else "dequantized"


def choose_merge_dtype(model: LoadedModel, asked: str) -> torch.dtype:
    """Settle ``"auto"``: the base checkpoint's own 16-bit dtype, else bfloat16."""
    import torch

    stored = find_stored_dtype(model) if asked == "auto" else asked
    return {"float16": torch.float16}.get(stored, torch.bfloat16)


def find_stored_dtype(model: LoadedModel) -> str:
    """The dtype that the base checkpoint is published in, for example ``"bfloat16"``.

    Raises:
        ModelNotFoundError: When its files are gone.
    """
    check_base_files(model)
    if model.base.is_prequantized:
        return model.base.compute_dtype
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        str(model.base.path),
        local_files_only=True,
        trust_remote_code=model.config.trust_remote_code,
    )
    return str(config.get_text_config().dtype).removeprefix("torch.")


def check_base_files(model: LoadedModel) -> None:
    """Refuse a model whose base was moved, removed or changed since it was loaded.

    Raises:
        ModelNotFoundError: Names the folder.
        UnsupportedModelError: Names the file that is another one now.
    """
    if not (model.base.path / "config.json").is_file():
        raise ModelNotFoundError(
            f"The base model is not in {model.base.path} any more, and this export reads it there. "
            "Put it back, or load the model from where it is now."
        )
    changed = find_changed_file(model)
    if changed is not None:
        raise UnsupportedModelError(
            f"{model.base.path / changed} changed since the model was loaded, and this export "
            "reads it there: it would not be the model that was trained. Put the old file back; "
            "format 'lora' with verify=False saves the adapter meanwhile."
        )


def find_changed_file(model: LoadedModel) -> str | None:
    """The first of the base's files that is not as it was loaded, if there is one."""
    now = stamp_files(model.base.path)
    names = [
        name
        for name in sorted({*model.base.stamps, *now})
        if model.base.stamps and model.base.stamps.get(name) != now.get(name)
    ]
    if names and "config.json" not in names and model.base.fingerprint is not None:
        # Written anew with the same content, or only touched.
        is_quantized = model.base.is_prequantized
        with contextlib.suppress(QloraKitError):
            if model.base.fingerprint == fingerprint_weights(
                model.base.path, is_quantized=is_quantized
            ):
                return None
    return names[0] if names else None


def describe_merge_base(model: LoadedModel, base: MergeBase) -> str:
    """One sentence for the user."""
    if model.base.quantization is None:
        return "merging into the weights in memory."
    if base == "original":
        return f"merging into the 16-bit weights in {model.base.path}."
    return f"merging into the {model.base.quantization} weights the adapter was trained on."


def warn_of_coarse_rounding(model: LoadedModel, base: MergeBase, what: str, advice: str) -> None:
    """Say so when weights that were in 4 bits are rounded to 4 bits again.

    Args:
        model: The live model.
        base: What the merge goes into.
        what: What is written in 4 bits or fewer.
        advice: What to do about it, a sentence.
    """
    if base == "dequantized" and model.base.quantization in ("nf4", "fp4"):
        logger.warning(
            "%s: weights that were in 4 bits are rounded to 4 bits again, which can swallow small "
            "updates. %s", what, advice,
        )  # fmt: skip


def is_loftq(model: LoadedModel) -> bool:
    """Whether the adapter was started by LoftQ."""
    adapter = getattr(model, "adapter", None)
    return adapter is not None and (
        bool(adapter.loftq_config) or adapter.init_lora_weights == "loftq"
    )
