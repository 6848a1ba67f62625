"""What every engine does alike with the models of transformers and peft."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pickle
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause
from qlora_kit.config import AdapterConfig
from qlora_kit.device import fork_generators
from qlora_kit.engines.adapter_start import (
    AdapterStart,
    check_start_is_known,
    read_start,
    repeat_start,
    restore_base,
)
from qlora_kit.engines.saved_adapter import (
    find_carried,
    read_weights,
    refuse_misplaced,
    resize_vocabulary,
)
from qlora_kit.engines.saved_adapter_config import changes_base, read_lora_config
from qlora_kit.errors import ConfigError, EngineError, QloraKitError, UnsupportedModelError
from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.messages import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "attach_saved_adapter",
    "check_start",
    "keep_random_states",
    "keep_weights_unpacked",
    "make_adapted",
    "make_lora_arguments",
    "settle_stop_tokens",
]

logger = logging.getLogger(__name__)


def make_adapted(
    loaded: LoadedModel,
    model: Any,
    config: AdapterConfig,
    start: AdapterStart | None = None,
) -> AdaptedModel:
    """The handle of a model that now has an adapter.

    Args:
        loaded: The base's handle.
        model: The base with the adapter on it.
        config: What was attached.
        start: How the adapter began, where that changed the base.
    """
    for peft_config in model.peft_config.values():
        # Where it lies, not its name on the hub: while saving, peft looks the name up there to see
        # whether the vocabulary was resized. Exports write the name.
        peft_config.base_model_name_or_path = str(loaded.base.path)
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
        start=start,
    )


def attach_saved_adapter(loaded: LoadedModel, folder: Path, *, is_trainable: bool) -> AdaptedModel:
    """Attach an adapter that peft saved, all of it, to a base of its vocabulary.

    Raises:
        UnsupportedModelError: When it does not fit the base, or lacks tensors.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    asked: Any = None
    try:
        start = read_start(folder)
        config = read_lora_config(loaded, folder, is_trainable=is_trainable)
        asked = config.init_lora_weights
        check_start_is_known(asked, start, folder)
        weights = read_weights(folder, loaded.model)
        resize_vocabulary(loaded.model, weights, config, folder)
        with warnings.catch_warnings():
            # refuse_misplaced says it in fewer words.
            warnings.filterwarnings("ignore", message=".*missing adapter keys")
            if config.target_parameters:
                # Patterns for parameters do match; peft looks for modules when it says so.
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not")
            with repeat_start(start):
                model = PeftModel.from_pretrained(
                    loaded.model,
                    str(folder),
                    config=config,
                    is_trainable=is_trainable,
                    local_files_only=True,
                )
        refuse_misplaced(model, weights, folder, loaded.base.name_or_path)
        start = restore_base(model, start, loaded.base.path, folder)
    except QloraKitError:
        raise
    except KeyError as error:  # what peft says of modules_to_save that are not in the file
        raise UnsupportedModelError(
            f"The adapter in {folder} does not fit {loaded.base.name_or_path}: it lacks {error}, "
            "which its adapter_config.json asks for. Copy the adapter again."
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EngineError(
            f"There is not enough memory for the adapter in {folder}: {describe_cause(error)}"
        ) from error
    except (
        ValueError, TypeError, RuntimeError, UserWarning, SafetensorError, OSError,
        AttributeError, IndexError, ArithmeticError, EOFError, pickle.UnpicklingError, ImportError,
    ) as error:  # fmt: skip
        if changes_base(asked) or asked == "loftq":
            raise UnsupportedModelError(
                f"The adapter in {folder} was started by {asked!r}, which changed the base's "
                f"weights, and peft cannot repeat that here: {error} Save the adapter again with "
                "path_initial_model_for_weight_conversion, which makes a plain one of it."
            ) from error
        raise UnsupportedModelError(
            f"The adapter in {folder} does not fit {loaded.base.name_or_path}, or is damaged: "
            f"{error}"
        ) from error
    adapted = make_adapted(loaded, model, _read_adapter_config(model, folder), start)
    return dataclasses.replace(adapted, carried_tensors=find_carried(model, weights))


#: The parts of an adapter's configuration that peft has too, under the same names.
_PEFT_FIELDS: Final = tuple(
    field.name
    for field in dataclasses.fields(AdapterConfig)
    if field.name not in ("use_gradient_checkpointing", "random_state")
)


def _read_adapter_config(model: Any, folder: Path) -> AdapterConfig:
    saved = model.peft_config["default"]
    # A merge has to know about LoftQ, and peft forgets it unless it may start anew.
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    saved.loftq_config = written.get("loftq_config") or {}
    if not isinstance(saved.loftq_config, dict):
        raise UnsupportedModelError(
            f"{folder / 'adapter_config.json'} is damaged: its loftq_config is "
            f"{saved.loftq_config!r}. Copy the adapter again."
        )
    values = {name: getattr(saved, name) for name in _PEFT_FIELDS}
    # What was asked for, not what peft made of it to load the weights.
    values["init_lora_weights"] = written.get("init_lora_weights", True)
    targets = saved.target_modules
    values["target_modules"] = targets if isinstance(targets, str) else sorted(targets or ())
    values["target_parameters"] = tuple(sorted(saved.target_parameters or ())) or None
    # peft writes an empty dictionary where there is none.
    for name in ("loftq_config", "rank_pattern", "alpha_pattern"):
        values[name] = values[name] or None
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    try:
        return AdapterConfig(**values)
    except ConfigError as error:
        if error.parameter != "init_lora_weights":
            raise
        logger.info(
            "The adapter was started by peft's %r, which cannot be asked for here; it trains on "
            "all the same.", values["init_lora_weights"],
        )  # fmt: skip
        return AdapterConfig(**{**values, "init_lora_weights": True})


def make_lora_arguments(config: AdapterConfig) -> dict[str, Any]:
    """An adapter's configuration as the arguments of peft's ``LoraConfig``."""
    values = {name: getattr(config, name) for name in _PEFT_FIELDS if name != "loftq_config"}
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = dict(values[name] or {})
    return {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in values.items()
    }


def check_start(loaded: LoadedModel, config: AdapterConfig) -> None:
    """Refuse a start that changes the base where the base cannot hold the change.

    Raises:
        ConfigError: For PiSSA and OLoRA on a quantized base.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora")) and loaded.base.quantization:
        raise ConfigError(
            Setting("init_lora_weights", init, "attach_lora"),
            f" changes the base weights, which a {loaded.base.quantization} base cannot hold.",
            parameter="init_lora_weights",
            value=init,
            advice=(
                "Load with ",
                Setting("load_in_4bit", False, "load_quantized"),
                ", or use LoftQ on the 4-bit base: ",
                Setting("loftq_config", {"loftq_bits": 4}, "attach_lora"),
                ".",
            ),
        )


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch back as they were found."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with fork_generators():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def settle_stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Let the model generate up to every token that ends an answer, and pad as its tokenizer does.

    Returns:
        Those tokens: the tokenizer's end token, then what the generation config has besides.
    """
    settings = model.generation_config
    stored = settings.eos_token_id
    stored = [] if stored is None else [stored] if isinstance(stored, int) else list(stored)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop_token_ids = tuple(dict.fromkeys([*own, *stored]))
    settings.eos_token_id = list(stop_token_ids)
    settings.pad_token_id = tokenizer.pad_token_id
    return stop_token_ids


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
