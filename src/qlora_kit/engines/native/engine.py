"""The native engine: transformers, peft and bitsandbytes, on every device they run on."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.device import fork_generators, to_torch_dtype
from qlora_kit.engines.adapter_start import capture_start
from qlora_kit.engines.base import DecodingSession, GenerativeModel, Trainer, TrainJob
from qlora_kit.engines.base_model import (
    explain_load_errors,
    open_checkpoint,
    refuse_missing_tensors,
)
from qlora_kit.engines.inference import inference_mode
from qlora_kit.engines.native import loftq
from qlora_kit.engines.peft_model import (
    attach_saved_adapter,
    check_start,
    keep_weights_unpacked,
    make_adapted,
    make_lora_arguments,
    settle_stop_tokens,
)
from qlora_kit.engines.quantization import make_quantization_config, set_compute_dtype
from qlora_kit.errors import ConfigError
from qlora_kit.handles import AdaptedModel, BaseInfo, LoadedModel

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["NativeEngine"]

logger = logging.getLogger(__name__)


class NativeEngine:
    """Loads, adapts, trains and runs models with unpatched libraries."""

    name = "native"

    def load(self, config: LoadConfig) -> LoadedModel:
        """Put the checkpoint in ``config.model_name``, a local folder, into memory."""
        from transformers import AutoModelForCausalLM

        from qlora_kit.engines.native.sharding.loading import (
            choose_node,
            finish_loading,
            make_device_map,
        )

        opened = open_checkpoint(config)
        folder, dtype, stored = opened.folder, opened.dtype, opened.stored
        node = choose_node(config, opened)
        device_map = {"": opened.device} if config.device_map is None else config.device_map
        with explain_load_errors(folder), warnings.catch_warnings():
            # They name tensors, where accelerate looks for modules.
            warnings.filterwarnings("ignore", "The following device_map keys do not match")
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder),
                output_loading_info=True,
                config=opened.model_config,
                dtype=to_torch_dtype(dtype),
                quantization_config=None if stored else make_quantization_config(config, dtype),
                device_map=device_map if node is None else make_device_map(opened, node),
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                attn_implementation=_choose_attention(opened.model_config),
            )
        refuse_missing_tensors(folder, loading["missing_keys"])
        if node is not None:
            finish_loading(model, opened, node)
        if opened.quantization is not None:
            _say_what_stays_wide(model)
        if opened.quantization in ("nf4", "fp4"):
            keep_weights_unpacked(model)
        if stored:
            set_compute_dtype(model, to_torch_dtype(dtype))
        stop_token_ids = settle_stop_tokens(model, opened.tokenizer)
        model.requires_grad_(False)
        base = BaseInfo(
            name_or_path=config.model_name,
            path=folder,
            quantization=opened.quantization,
            compute_dtype=dtype,
            is_prequantized=stored is not None,
            stop_token_ids=stop_token_ids,
            fingerprint=opened.fingerprint,
            stamps=opened.stamps,
        )
        return LoadedModel(model, opened.tokenizer, self, base, config)

    def attach(self, loaded: LoadedModel, config: AdapterConfig) -> AdaptedModel:
        """Attach a LoRA adapter through peft; parameters stay in float32 for training."""
        import torch
        from peft import get_peft_model

        from qlora_kit.engines.native.decoding.decoders import release_decoder
        from qlora_kit.engines.native.sharding.shards import refuse_reading_start

        release_decoder(loaded.model)
        use_loftq = loftq.is_requested(config)
        if use_loftq:
            loftq.check(loaded.base, config)
        check_start(loaded, config)
        refuse_reading_start(loaded.model, config)
        # peft draws the initial weights from the global generators; they are put back after.
        with fork_generators(), warnings.catch_warnings():
            if config.target_parameters:
                # Patterns for parameters do match; peft looks for modules when it says so.
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not")
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
        _say_what_peft_reads(model.peft_config["default"], config)
        model.config.get_text_config().use_cache = True
        return make_adapted(loaded, model, config, capture_start(model, config.random_state))

    def attach_saved(
        self, loaded: LoadedModel, folder: Path, *, is_trainable: bool
    ) -> AdaptedModel:
        """Attach an adapter that peft saved."""
        return attach_saved_adapter(loaded, folder, is_trainable=is_trainable)

    def make_trainer(self, model: AdaptedModel, job: TrainJob) -> Trainer:
        """TRL's trainer, with adapters kept in float32."""
        from qlora_kit.engines.native.trainer import NativeTrainer

        return NativeTrainer(
            model=model.model,
            args=job.args,
            train_dataset=job.train_dataset,
            eval_dataset=job.eval_dataset,
            compute_metrics=job.compute_metrics,
            processing_class=model.tokenizer,
            data_collator=job.collator,
            callbacks=list(job.callbacks),
            plan=job.plan,
            chooses_checkpointing=job.chooses_checkpointing,
        )

    @contextlib.contextmanager
    def inference(self, model: LoadedModel) -> Iterator[GenerativeModel]:
        """Eval mode with the key/value cache on, adapters added as in training.

        The last of several readers puts all of it back.
        """
        from qlora_kit.engines.native.layers.rounding import rounding_once
        from qlora_kit.engines.native.sharding.shards import whole_while_read

        with (
            whole_while_read(model.model),
            inference_mode(model.model, model.tokenizer),
            rounding_once(model.model),
        ):
            yield model.model

    @contextlib.contextmanager
    def decode(
        self,
        model: LoadedModel,
        config: GenerationConfig,
        *,
        seed: int | None,
        most_tokens: int,
        at_once: int,
    ) -> Iterator[DecodingSession | str]:
        """The decoder beside the training step, for the models that step computes."""
        from qlora_kit.engines.native.decoding.decoders import open_session

        with open_session(
            model.model, config, seed=seed, most_tokens=most_tokens, at_once=at_once
        ) as session:
            yield session


def _choose_attention(model_config: Any) -> str | None:
    """SDPA where the architecture has it, else what transformers falls back to."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(model_config.get_text_config(), "attn_logit_softcapping", None):
        # transformers' SDPA leaves the cap out without a word.
        return "eager"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else None


def _make_lora_config(config: AdapterConfig, *, use_loftq: bool) -> Any:
    from peft import LoraConfig

    arguments = make_lora_arguments(config)
    if use_loftq:
        # LoftQ is computed here afterwards: peft's own needs a GPU and an unquantized base.
        arguments["init_lora_weights"] = True
    return LoraConfig(task_type="CAUSAL_LM", **arguments)


def _say_what_peft_reads(made: Any, config: AdapterConfig) -> None:
    """Where a family's linear experts became stacks, peft takes their names for the stacks'."""
    added = sorted(set(made.target_parameters or ()) - set(config.target_parameters or ()))
    if added:
        ranks = {name: made.rank_pattern.get(rf".*\.{name}", made.r) for name in added}
        logger.warning(
            "peft adapts the experts' %s instead of modules of the same names: shared experts and "
            "layers without experts get no adapter.",
            ", ".join(f"{name} (rank {rank})" for name, rank in ranks.items()),
        )


def _say_what_stays_wide(model: Any) -> None:
    """Experts that lie in stacks are no linear layers, which is what bitsandbytes quantizes."""
    stacks = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name and parameter.is_floating_point()
    ]
    if stacks:
        size = sum(one.numel() * one.element_size() for one in stacks)
        logger.warning(
            "The weights of the experts stay in %s, %.1f GiB in all: bitsandbytes quantizes linear "
            "layers, and transformers holds experts in stacks.",
            str(stacks[0].dtype).removeprefix("torch."), size / 1024**3,
        )  # fmt: skip
