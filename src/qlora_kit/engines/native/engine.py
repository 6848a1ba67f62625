"""The native engine: transformers, peft and bitsandbytes, on every device they run on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.device import choose_compute_dtype, get_device, to_torch_dtype
from qlora_kit.engines.base import TrainJob
from qlora_kit.engines.native import loftq, quantization
from qlora_kit.engines.native.inference import inference_mode
from qlora_kit.engines.native.tokenizer import load_tokenizer
from qlora_kit.engines.shared import (
    attach_saved_adapter,
    collect_stop_token_ids,
    keep_weights_unpacked,
    make_adapted,
    warn_beyond_positions,
)
from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.results import AdaptedModel, BaseInfo, LoadedModel

if TYPE_CHECKING:
    from trl import SFTTrainer

__all__ = ["NativeEngine"]

logger = logging.getLogger(__name__)


class NativeEngine:
    """Loads, adapts, trains and runs models with unpatched libraries."""

    name = "native"

    def load(self, config: LoadConfig) -> LoadedModel:
        """Put the checkpoint in ``config.model_name``, a local folder, into memory."""
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        folder = Path(config.model_name)
        device = get_device()
        dtype = choose_compute_dtype(config.dtype, device)
        stored = quantization.read_stored_quantization(folder)
        wanted: quantization.QuantizationName | None = (
            "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None
        )
        if stored is not None and wanted != stored:
            logger.info("%s is already quantized to %s and stays so.", folder, stored)
        active = stored or wanted
        if active is not None:
            quantization.check_bitsandbytes(device, active)
        model_config = _read_model_config(folder, config)
        warn_beyond_positions(config.max_seq_length, model_config)
        tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder),
                output_loading_info=True,
                config=model_config,
                dtype=to_torch_dtype(dtype),
                quantization_config=(
                    None if stored else quantization.make_quantization_config(config, dtype)
                ),
                device_map={"": device} if config.device_map is None else config.device_map,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                attn_implementation="sdpa",
            )
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedModelError(
                f"transformers cannot load {folder} as a causal language model: {error}"
            ) from error
        except SafetensorError as error:
            raise UnsupportedModelError(
                f"A weight file in {folder} is damaged or cut short ({error}). Download it again."
            ) from error
        # transformers would leave these at random values and go on.
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise UnsupportedModelError(
                f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}. "
                "Download the model again."
            )
        if active in ("nf4", "fp4"):
            keep_weights_unpacked(model)
            if stored:
                quantization.set_compute_dtype(model, to_torch_dtype(dtype))
        stop_token_ids = collect_stop_token_ids(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = list(stop_token_ids)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.requires_grad_(False)
        base = BaseInfo(
            name_or_path=config.model_name,
            path=folder,
            quantization=active,
            compute_dtype=dtype,
            is_prequantized=stored is not None,
            stop_token_ids=stop_token_ids,
        )
        return LoadedModel(model, tokenizer, self, base, config)

    def attach(self, loaded: LoadedModel, config: AdapterConfig) -> AdaptedModel:
        """Attach a LoRA adapter through peft; parameters stay in float32 for training."""
        import torch
        from peft import get_peft_model

        use_loftq = loftq.is_requested(config)
        if use_loftq:
            loftq.check(loaded.base, config)
        _check_start(loaded, config)
        # peft draws the initial weights from the global generators; they are put back after.
        with torch.random.fork_rng():
            torch.manual_seed(config.random_state)
            try:
                model = get_peft_model(
                    loaded.model,
                    _make_lora_config(config, use_loftq=use_loftq),
                    revision=loaded.config.revision,
                )
            except (ValueError, TypeError) as error:
                raise ConfigError(f"peft refuses this adapter: {error}") from error
            if use_loftq:
                loftq.initialize(model, loaded.base.path)
                # Whatever is saved from here on must still say how the adapter was started.
                model.peft_config["default"].loftq_config = {
                    "loftq_bits": 4,
                    **(config.loftq_config or {}),
                }
        model.config.use_cache = True
        return make_adapted(loaded, model, config)

    def attach_saved(
        self, loaded: LoadedModel, folder: Path, *, is_trainable: bool
    ) -> AdaptedModel:
        """Attach an adapter that peft saved."""
        return attach_saved_adapter(loaded, folder, is_trainable=is_trainable)

    def make_trainer(self, model: AdaptedModel, job: TrainJob) -> SFTTrainer:
        """TRL's trainer, with adapters kept in float32."""
        from qlora_kit.engines.native.trainer import NativeTrainer

        return NativeTrainer(
            model=model.model,
            args=job.args,
            train_dataset=job.train_dataset,
            eval_dataset=job.eval_dataset,
            processing_class=model.tokenizer,
            data_collator=job.collator,
            callbacks=list(job.callbacks),
            plan=job.plan,
            chooses_checkpointing=job.chooses_checkpointing,
        )

    @contextlib.contextmanager
    def inference(self, model: LoadedModel) -> Iterator[Any]:
        """Eval mode with the key/value cache on, adapters added as in training.

        The last of several readers puts all of it back.
        """
        from qlora_kit.engines.native.fast.answering import rounding_once

        with inference_mode(model.model), rounding_once(model.model):
            yield model.model


def _make_lora_config(config: AdapterConfig, *, use_loftq: bool) -> Any:
    from peft import LoraConfig

    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        # LoftQ is computed here afterwards: peft's own needs a GPU and an unquantized base.
        init_lora_weights=True if use_loftq else config.init_lora_weights,
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        layers_to_transform=(
            config.layers_to_transform
            if config.layers_to_transform is None or isinstance(config.layers_to_transform, int)
            else list(config.layers_to_transform)
        ),
        rank_pattern=dict(config.rank_pattern or {}),
        alpha_pattern=dict(config.alpha_pattern or {}),
    )


def _read_model_config(folder: Path, config: LoadConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"transformers does not know the model in {folder}: {error}"
        ) from error


def _check_start(loaded: LoadedModel, config: AdapterConfig) -> None:
    """Refuse a start that changes the base where the base cannot hold the change."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora")) and loaded.base.quantization:
        raise ConfigError(
            f"init_lora_weights={init!r} changes the base weights, which a "
            f"{loaded.base.quantization} base cannot hold. Load with load_in_4bit=False, or use "
            "LoftQ on the 4-bit base: loftq_config={'loftq_bits': 4}."
        )
