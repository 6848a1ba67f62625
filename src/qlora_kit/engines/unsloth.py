"""The unsloth engine, and the only file that names unsloth.

unsloth patches transformers, trl and peft when it is imported, so it is imported here and
only when this engine was chosen. Checked with unsloth 2026.10.9, on a CPU and on one GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_kit.config import AdapterConfig, DtypeName, LoadConfig
from qlora_kit.device import choose_compute_dtype, get_device, to_torch_dtype
from qlora_kit.engines.adapter_start import capture_start
from qlora_kit.engines.base import GenerativeModel, Trainer, TrainerBase, TrainJob
from qlora_kit.engines.base_model import OpenedCheckpoint, open_checkpoint
from qlora_kit.engines.captured_prints import log_prints_of
from qlora_kit.engines.inference import inference_mode
from qlora_kit.engines.peft_model import (
    attach_saved_adapter,
    check_start,
    keep_random_states,
    keep_weights_unpacked,
    make_adapted,
    settle_stop_tokens,
)
from qlora_kit.engines.quantization import set_compute_dtype
from qlora_kit.errors import (
    ConfigError,
    EngineError,
    MissingDependencyError,
    QloraKitError,
    UnsupportedModelError,
)
from qlora_kit.handles import AdaptedModel, BaseInfo, LoadedModel
from qlora_kit.messages import Setting

__all__ = ["UnslothEngine"]

logger = logging.getLogger(__name__)

# Its banners and notes go to standard output, which belongs to the program.
_log_prints = functools.partial(log_prints_of, "unsloth", logger)

# unsloth decodes with one key/value buffer on each attention module (``paged_attention``), which
# answers computed at once would overwrite for each other.
_generating = threading.RLock()


class UnslothEngine:
    """Loads, adapts and trains through unsloth's ``FastLanguageModel``.

    What unsloth prints is logged. Streams that overlap are computed one after another.

    Raises:
        MissingDependencyError: When unsloth cannot be imported on this machine.
    """

    name = "unsloth"

    def __init__(self) -> None:
        late = [name for name in ("transformers", "trl", "peft") if name in sys.modules]
        if late and "unsloth" not in sys.modules:
            logger.info(
                "unsloth is imported after %s; it patches them all the same, but code that took "
                "names from them before runs unpatched.",
                ", ".join(late),
            )
        try:
            with _log_prints():
                self._unsloth = importlib.import_module("unsloth")
        # unsloth raises NotImplementedError or RuntimeError where it cannot run.
        except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
            raise MissingDependencyError(
                f"unsloth is installed but cannot be imported here: {error}.",
                advice=("Use ", Setting("engine", "native", "load_quantized"), "."),
            ) from error

    def quietly(self) -> contextlib.AbstractContextManager[None]:
        """Log what unsloth prints meanwhile."""
        return _log_prints()

    def load(self, config: LoadConfig) -> LoadedModel:
        """Put the checkpoint in ``config.model_name``, a local folder, into memory."""
        if config.shard is True:
            raise ConfigError(
                Setting("shard", True, "load_quantized"),
                " is the native engine's; unsloth holds a base whole on every card. Use ",
                Setting("engine", "native", "load_quantized"),
                ".",
                parameter="shard",
            )
        opened = open_checkpoint(config)
        folder = opened.folder
        placement = {} if config.device_map is None else {"device_map": config.device_map}
        with _log_prints(), keep_random_states(), _explain(f"load {folder}", UnsupportedModelError):
            model, tokenizer = self._unsloth.FastLanguageModel.from_pretrained(
                model_name=str(folder),
                # Beyond the model's positions unsloth would scale RoPE, in memory alone: an adapter
                # trained so would not fit the base anywhere else.
                max_seq_length=_stay_within_positions(config.max_seq_length, opened),
                dtype=to_torch_dtype(opened.dtype),
                load_in_4bit=opened.quantization in ("nf4", "fp4"),
                load_in_8bit=opened.quantization == "int8",
                trust_remote_code=config.trust_remote_code,
                # The files are here already, whatever the user allowed for finding them.
                local_files_only=True,
                **placement,
            )
        quantization = _read_quantization(model)
        if quantization != opened.quantization:
            raise EngineError(
                f"unsloth loads {folder} {quantization or 'unquantized'} here, and not in "
                f"{opened.quantization}.",
                advice=("Use ", Setting("engine", "native", "load_quantized"), "."),
            )
        if quantization in ("nf4", "fp4"):
            keep_weights_unpacked(model)
            if opened.stored:
                set_compute_dtype(model, to_torch_dtype(opened.dtype))
        model.generate = types.MethodType(_one_at_a_time(model.generate.__func__), model)
        _undo_limits(model, tokenizer, opened, config.max_seq_length)
        base = BaseInfo(
            name_or_path=config.model_name,
            path=folder,
            quantization=opened.quantization,
            compute_dtype=_read_dtype(model, opened),
            is_prequantized=opened.stored is not None,
            stop_token_ids=settle_stop_tokens(model, tokenizer),
            fingerprint=opened.fingerprint,
            stamps=opened.stamps,
        )
        return LoadedModel(model, tokenizer, self, base, config)

    def attach(self, loaded: LoadedModel, config: AdapterConfig) -> AdaptedModel:
        """Attach a LoRA adapter through unsloth."""
        if config.init_lora_weights == "loftq" or config.loftq_config:
            raise EngineError(
                "unsloth refuses LoftQ on a 4-bit base; ",
                Setting("engine", "native", "load_quantized"),
                " supports it.",
            )
        refused = {
            "use_dora": config.use_dora,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "target_parameters": config.target_parameters,
        }
        for name, value in refused.items():
            if value:
                raise EngineError(
                    f"unsloth ignores {name}; ",
                    Setting("engine", "native", "load_quantized"),
                    " supports it.",
                )
        check_start(loaded, config)
        checkpointing: Any = config.use_gradient_checkpointing
        if checkpointing == "auto":
            checkpointing = "unsloth" if get_device().type != "cpu" else False
        with _log_prints(), keep_random_states(), _explain("attach this adapter", EngineError):
            model = self._unsloth.FastLanguageModel.get_peft_model(
                loaded.model,
                r=config.r,
                target_modules=(
                    config.target_modules
                    if isinstance(config.target_modules, str)
                    else list(config.target_modules)
                ),
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                bias=config.bias,
                layers_to_transform=config.layers_to_transform,
                use_gradient_checkpointing=checkpointing,
                random_state=config.random_state,
                max_seq_length=loaded.max_seq_length,
                use_rslora=config.use_rslora,
                modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
                init_lora_weights=config.init_lora_weights,
                loftq_config={},
            )
        # As peft does when it is told; unsloth does not tell it.
        model.peft_config["default"].revision = loaded.config.revision
        return make_adapted(loaded, model, config, capture_start(model, config.random_state))

    def attach_saved(
        self, loaded: LoadedModel, folder: Path, *, is_trainable: bool
    ) -> AdaptedModel:
        """Attach an adapter that peft saved."""
        return attach_saved_adapter(loaded, folder, is_trainable=is_trainable)

    def make_trainer(self, model: AdaptedModel, job: TrainJob) -> Trainer:
        """TRL's trainer as unsloth left it.

        Raises:
            EngineError: For packed rows on a GPU, where unsloth's attention would let packed
                examples see each other when the collator is not its own.
        """
        if job.plan:
            raise EngineError(
                "plan is for ",
                Setting("engine", "native", "load_quantized"),
                ", which computes its own training step; unsloth computes steps in its own way.",
            )
        if job.is_packed and get_device().type != "cpu":
            raise EngineError(
                "packing or padding_free with ",
                Setting("engine", "unsloth", "load_quantized"),
                " on a GPU would let the examples of a row see each other.",
                advice=(
                    "Use ",
                    Setting("engine", "native", "load_quantized"),
                    " for them, or leave them out.",
                ),
            )
        with _log_prints():
            self._unsloth.FastLanguageModel.for_training(
                model.model, use_gradient_checkpointing=job.args.gradient_checkpointing
            )
            trainer: Trainer = _make_trainer_class()(
                model=model.model,
                args=job.args,
                train_dataset=job.train_dataset,
                eval_dataset=job.eval_dataset,
                compute_metrics=job.compute_metrics,
                processing_class=model.tokenizer,
                data_collator=job.collator,
                callbacks=list(job.callbacks),
            )
        return trainer

    @contextlib.contextmanager
    def inference(self, model: LoadedModel) -> Iterator[GenerativeModel]:
        """Unsloth's inference mode; the last of several readers puts everything back."""
        switch = self._unsloth.FastLanguageModel.for_inference
        with inference_mode(model.model, model.tokenizer, switch=switch):
            yield model.model


def _make_trainer_class() -> Any:
    """TRL's trainer is patched in place, so it is looked up when a run begins."""
    trl: Any = importlib.import_module("trl")

    class UnslothTrainer(TrainerBase, trl.SFTTrainer):
        """``SFTTrainer`` as patched by unsloth, with this library's counters."""

        def train(self, *args: Any, **kwargs: Any) -> Any:
            """Train; what callbacks print stays on standard output."""
            with _log_prints():
                return super().train(*args, **kwargs)

    return UnslothTrainer


@contextlib.contextmanager
def _explain(action: str, kind: type[QloraKitError]) -> Iterator[None]:
    """Turn what unsloth raises, bare ``Exception`` included, into an error of ours."""
    import torch

    try:
        yield
    except (QloraKitError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"unsloth needs another package to {action}: {error}.",
            advice=("Or use ", Setting("engine", "native", "load_quantized"), "."),
        ) from error
    except Exception as error:
        raise kind(f"unsloth cannot {action}: {error}. engine='native' may.") from error


def _one_at_a_time(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A ``generate`` method that waits for the answer being computed."""

    @functools.wraps(generate)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _generating:
            return generate(self, *args, **kwargs)

    return alone


def _stay_within_positions(max_seq_length: int, opened: OpenedCheckpoint) -> int:
    text_config = opened.model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    return min(max_seq_length, positions) if positions else max_seq_length


def _undo_limits(model: Any, tokenizer: Any, opened: OpenedCheckpoint, max_seq_length: int) -> None:
    """Take back limits that unsloth sets, and that would be saved or cut rows short."""
    # It cuts what is longer than this.
    for module in model.modules():
        if "max_seq_length" in vars(module):
            module.max_seq_length = max_seq_length
    path = opened.folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model.generation_config.max_length = stated.get("max_length")
    tokenizer.model_max_length = opened.tokenizer.model_max_length
    tokenizer.padding_side = "right"


def _read_dtype(model: Any, opened: OpenedCheckpoint) -> DtypeName:
    """What unsloth made of the dtype: it replaces float16 where that would not train."""
    if model.dtype == to_torch_dtype(opened.dtype):
        return opened.dtype
    dtype = choose_compute_dtype(model.dtype, opened.device)
    logger.warning("unsloth computes in %s here, and not in %s.", dtype, opened.dtype)
    return dtype


def _read_quantization(model: Any) -> Any:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    stored = config if isinstance(config, dict) else config.to_dict()
    if stored.get("load_in_8bit"):
        return "int8"
    return stored.get("bnb_4bit_quant_type", "nf4") if stored.get("load_in_4bit") else None
