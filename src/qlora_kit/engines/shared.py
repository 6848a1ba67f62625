"""What every engine does alike with the models of transformers and peft."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import AdapterConfig
from qlora_kit.errors import UnsupportedModelError
from qlora_kit.results import AdaptedModel, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "attach_saved_adapter",
    "collect_stop_token_ids",
    "keep_weights_unpacked",
    "make_adapted",
    "warn_beyond_positions",
]

logger = logging.getLogger(__name__)


def make_adapted(loaded: LoadedModel, model: Any, config: AdapterConfig) -> AdaptedModel:
    """The handle of a model that now has an adapter."""
    trainable, total = model.get_nb_trainable_parameters()
    return AdaptedModel(
        model=model,
        tokenizer=loaded.tokenizer,
        engine=loaded.engine,
        base=loaded.base,
        config=loaded.config,
        record=loaded.record,
        adapter=config,
        trainable_parameters=int(trainable),
        total_parameters=int(total),
    )


def attach_saved_adapter(loaded: LoadedModel, folder: Path, *, is_trainable: bool) -> AdaptedModel:
    """Attach an adapter that peft saved, all of it.

    Raises:
        UnsupportedModelError: When it does not fit the base, or lacks tensors.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            # peft would go on with random weights for what is missing.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            # peft drops it, and _read_adapter_config puts it back.
            warnings.filterwarnings("ignore", message="`loftq_config` specified")
            model = PeftModel.from_pretrained(
                loaded.model, str(folder), is_trainable=is_trainable, local_files_only=True
            )
    except (ValueError, TypeError, KeyError, RuntimeError, UserWarning, SafetensorError) as error:
        raise UnsupportedModelError(
            f"The adapter in {folder} does not fit {loaded.base.name_or_path}, or is damaged: "
            f"{error}"
        ) from error
    return make_adapted(loaded, model, _read_adapter_config(model, folder))


def _read_adapter_config(model: Any, folder: Path) -> AdapterConfig:
    saved = model.peft_config["default"]
    # A merge has to know about LoftQ, and peft forgets it unless it may start anew.
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    saved.loftq_config = json.loads(text).get("loftq_config") or {}
    targets = saved.target_modules
    return AdapterConfig(
        r=saved.r,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        lora_alpha=saved.lora_alpha,
        lora_dropout=saved.lora_dropout,
        bias=saved.bias,
        use_rslora=saved.use_rslora,
        use_dora=saved.use_dora,
        loftq_config=saved.loftq_config or None,
        modules_to_save=saved.modules_to_save,
        layers_to_transform=saved.layers_to_transform,
        rank_pattern=saved.rank_pattern or None,
        alpha_pattern=saved.alpha_pattern or None,
    )


def collect_stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any
) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's end token, then the generation config's."""
    stored = generation_config.eos_token_id
    stored = [] if stored is None else [stored] if isinstance(stored, int) else list(stored)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*own, *stored]))


def keep_weights_unpacked(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    ``Linear4bit.forward`` repacks the weight the first time a layer runs in eval mode, and
    rounds the scales to bfloat16 while doing so: training, merging or saving afterwards would
    see other numbers than before (bitsandbytes 0.50, ``_convert_weight_packed_for_cpu``).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def warn_beyond_positions(max_seq_length: int, model_config: Any) -> None:
    """Say so when sequences will be longer than the model was trained for."""
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and max_seq_length > positions:
        logger.warning(
            "max_seq_length=%d is beyond the %d positions this model was trained for; "
            "answers past that point may be poor.",
            max_seq_length,
            positions,
        )
