"""The unsloth engine, and the only file that names unsloth.

unsloth patches transformers, trl and peft when it is imported, so it is imported here and
only when this engine was chosen. Checked with unsloth 2026.10.9, on a CPU and on one GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.device import choose_compute_dtype, get_device, to_torch_dtype
from qlora_kit.engines.base import TrainJob
from qlora_kit.engines.draft_cards import NoDraftCards
from qlora_kit.engines.offline import NoTelemetry
from qlora_kit.engines.portable_loss import PortableLoss
from qlora_kit.engines.recording import StepRecorder
from qlora_kit.engines.shared import (
    attach_saved_adapter,
    collect_stop_token_ids,
    keep_weights_unpacked,
    make_adapted,
    warn_beyond_positions,
)
from qlora_kit.errors import ConfigError, EngineError, MissingDependencyError, UnsupportedModelError
from qlora_kit.results import AdaptedModel, BaseInfo, LoadedModel

if TYPE_CHECKING:
    from trl import SFTTrainer

__all__ = ["UnslothEngine"]

logger = logging.getLogger(__name__)


class UnslothEngine:
    """Loads, adapts and trains through unsloth's ``FastLanguageModel``.

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
            self._unsloth = importlib.import_module("unsloth")
        # unsloth raises NotImplementedError or RuntimeError where it cannot run.
        except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
            raise MissingDependencyError(
                f"unsloth is installed but cannot be imported here: {error}. Use engine='native'."
            ) from error

    def load(self, config: LoadConfig) -> LoadedModel:
        """Put the checkpoint in ``config.model_name``, a local folder, into memory."""
        folder = Path(config.model_name)
        device = get_device()
        dtype = choose_compute_dtype(config.dtype, device)
        placement = {} if config.device_map is None else {"device_map": config.device_map}
        try:
            model, tokenizer = self._unsloth.FastLanguageModel.from_pretrained(
                model_name=str(folder),
                max_seq_length=config.max_seq_length,
                dtype=to_torch_dtype(dtype),
                load_in_4bit=config.load_in_4bit,
                load_in_8bit=config.load_in_8bit,
                trust_remote_code=config.trust_remote_code,
                # The files are here already, whatever the user allowed for finding them.
                local_files_only=True,
                **placement,
            )
        except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"unsloth cannot load {folder}: {error}. engine='native' may."
            ) from error
        warn_beyond_positions(config.max_seq_length, model.config)
        quantization = _read_quantization(model)
        if quantization in ("nf4", "fp4"):
            keep_weights_unpacked(model)
        tokenizer.padding_side = "right"
        stop_token_ids = collect_stop_token_ids(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = list(stop_token_ids)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        base = BaseInfo(
            name_or_path=config.model_name,
            path=folder,
            quantization=quantization,
            compute_dtype=dtype,
            is_prequantized="quantization_config" in (folder / "config.json").read_text("utf-8"),
            stop_token_ids=stop_token_ids,
        )
        return LoadedModel(model, tokenizer, self, base, config)

    def attach(self, loaded: LoadedModel, config: AdapterConfig) -> AdaptedModel:
        """Attach a LoRA adapter through unsloth."""
        if config.init_lora_weights == "loftq" or config.loftq_config:
            raise EngineError("unsloth refuses LoftQ on a 4-bit base; engine='native' supports it.")
        refused = {
            "use_dora": config.use_dora,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
        }
        for name, value in refused.items():
            if value:
                raise EngineError(f"unsloth ignores {name}; engine='native' supports it.")
        init = config.init_lora_weights
        if isinstance(init, str) and init.startswith("pissa") and loaded.base.quantization:
            raise ConfigError(
                f"init_lora_weights={init!r} needs a base loaded with load_in_4bit=False."
            )
        checkpointing: Any = config.use_gradient_checkpointing
        if checkpointing == "auto":
            checkpointing = "unsloth" if get_device().type != "cpu" else False
        try:
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
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise EngineError(f"unsloth cannot attach this adapter: {error}") from error
        return make_adapted(loaded, model, config)

    def attach_saved(
        self, loaded: LoadedModel, folder: Path, *, is_trainable: bool
    ) -> AdaptedModel:
        """Attach an adapter that peft saved."""
        return attach_saved_adapter(loaded, folder, is_trainable=is_trainable)

    def make_trainer(self, model: AdaptedModel, job: TrainJob) -> SFTTrainer:
        """TRL's trainer as unsloth left it.

        Raises:
            EngineError: For packed rows on a GPU, where unsloth's attention would let packed
                examples see each other when the collator is not its own.
        """
        if job.plan:
            raise EngineError(
                "plan is for engine='native', which computes its own training step; unsloth "
                "computes steps in its own way."
            )
        if job.is_packed and get_device().type != "cpu":
            raise EngineError(
                "packing or padding_free with engine='unsloth' on a GPU would let the examples of "
                "a row see each other. Use engine='native' for them, or leave them out."
            )
        if hasattr(self._unsloth.FastLanguageModel, "for_training"):
            self._unsloth.FastLanguageModel.for_training(
                model.model, use_gradient_checkpointing=job.args.gradient_checkpointing
            )
        trainer_class = _make_trainer_class()
        return trainer_class(
            model=model.model,
            args=job.args,
            train_dataset=job.train_dataset,
            eval_dataset=job.eval_dataset,
            processing_class=model.tokenizer,
            data_collator=job.collator,
            callbacks=list(job.callbacks),
            **job.extra,
        )

    @contextlib.contextmanager
    def inference(self, model: LoadedModel) -> Iterator[Any]:
        """Unsloth's inference mode, left again on exit when the model was training."""
        fast = self._unsloth.FastLanguageModel
        was_training = model.model.training
        had_checkpointing = getattr(model.model, "is_gradient_checkpointing", False)
        fast.for_inference(model.model)
        model.model.eval()
        try:
            yield model.model
        finally:
            if was_training:
                fast.for_training(model.model, use_gradient_checkpointing=had_checkpointing)
            model.model.train(was_training)


def _make_trainer_class() -> Any:
    """TRL's trainer is patched in place, so it is looked up when a run begins."""
    trl: Any = importlib.import_module("trl")

    class UnslothTrainer(StepRecorder, PortableLoss, NoTelemetry, NoDraftCards, trl.SFTTrainer):
        """``SFTTrainer`` as patched by unsloth, with this library's counters."""

    return UnslothTrainer


def _read_quantization(model: Any) -> Any:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    stored = config if isinstance(config, dict) else config.to_dict()
    if stored.get("load_in_8bit"):
        return "int8"
    return stored.get("bnb_4bit_quant_type", "nf4") if stored.get("load_in_4bit") else None
