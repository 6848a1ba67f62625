"""Handles of a model in memory: what travels from stage to stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.errors import ConfigError
from qlora_kit.messages import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.engines.base import Engine
    from qlora_kit.results import TrainResult

__all__ = ["AdaptedModel", "BaseInfo", "HandleError", "LoadedModel", "RunRecord"]

#: Methods that people know from elsewhere, and what does the same here.
_METHODS: Final[Mapping[str, str]] = {
    "generate": "use generate_stream(model, prompt), or generate_batch(model, prompts).",
    "save_pretrained": 'use export_model(model, "lora", "lora_model").',
    "save_pretrained_merged": 'use export_model(model, "merged_16bit", "merged").',
    "save_pretrained_gguf": 'use export_model(model, "gguf", "gguf_model").',
    "push_to_hub": 'use export_model(model, "hub", repo_id=..., format="lora").',
    "push_to_hub_merged": 'use export_model(model, "hub", repo_id=..., format="merged_16bit").',
    "push_to_hub_gguf": 'use export_model(model, "hub", repo_id=..., format="gguf").',
    "print_trainable_parameters": "print model.trainable_parameters and model.total_parameters.",
    "merge_and_unload": 'use export_model(model, "merged_16bit", "merged").',
    "train": "use train_sft(model, rows).",
    "eval": "nothing is needed: answers and exports set the mode, and put it back.",
    "for_inference": "nothing is needed: generate_stream sets the mode, and puts it back.",
}


class HandleError(ConfigError, AttributeError):
    """A handle was taken for the model that it holds."""


@dataclass(frozen=True)
class BaseInfo:
    """Where a base model came from and what it became in memory.

    Attributes:
        name_or_path: What the user asked for.
        path: The local folder its files were read from.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``None`` for 16/32-bit weights.
        compute_dtype: The dtype matrix products run in, for example ``"bfloat16"``.
        is_prequantized: Whether the files themselves are already quantized, so that no
            16-bit original exists to merge into.
        source: ``"checkpoint"`` or ``"gguf"`` (then ``path`` is the dequantized cache).
        stop_token_ids: Every token that ends an answer of the base, the end-of-text token first.
        fingerprint: Of its weights' content, or ``None`` where the engine does not tell.
        stamps: What tells whether its files changed since they were read, by name.
    """

    name_or_path: str
    path: Path
    quantization: Literal["nf4", "fp4", "int8"] | None
    compute_dtype: str
    is_prequantized: bool = False
    source: Literal["checkpoint", "gguf"] = "checkpoint"
    stop_token_ids: tuple[int, ...] = ()
    fingerprint: str | None = None
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)


@dataclass
class RunRecord:
    """What happened to a model since it was loaded; shared by its handles.

    Attributes:
        formatter: The formatter whose template the model was last trained with.
        training: The result of the last training.
        adapter_path: Where the adapter was loaded from; ``None`` for a new one.
        examples: What it was last trained on, a dataset with ``input_ids``.
    """

    formatter: Any = None
    training: TrainResult | None = None
    adapter_path: Path | None = None
    examples: Any = None


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory. Unpacks as ``model, tokenizer = loaded``.

    Attributes:
        model: The transformers model (or the peft model around it).
        tokenizer: Its tokenizer.
        engine: The engine that loaded it and runs it.
        base: Where it came from and what it became in memory.
        config: What was asked for.
        record: What happened to it since: the last formatter and training result.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    base: BaseInfo
    config: LoadConfig
    record: RunRecord = field(default_factory=RunRecord, repr=False, compare=False)

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Longest sequence, in tokens, that training and generation use."""
        return self.config.max_seq_length

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer; generation, exports and their checks all ask here.

        The base's own come first, the tokenizer's end token before those of the generation
        config; then the end token that the model was last trained with, and the added tokens
        among the other stops of that formatter.

        Raises:
            ConfigError: When the formatter's end token is not one of this model.
        """
        formatter = self.record.formatter
        if formatter is None:
            return self.base.stop_token_ids
        added = self.tokenizer.added_tokens_encoder
        stops = formatter.template_spec().get("stop") or ()
        trained = [self.find_end_token_id(formatter), *(added.get(text) for text in stops)]
        ids = (*self.base.stop_token_ids, *(index for index in trained if index is not None))
        return tuple(dict.fromkeys(ids))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer and are not a token: the formatter's other stops."""
        formatter = self.record.formatter
        if formatter is None:
            return ()
        spec = formatter.template_spec()
        tokens = {*self.tokenizer.added_tokens_encoder, spec.get("eos_token")}
        return tuple(text for text in spec.get("stop") or () if text and text not in tokens)

    def find_end_token_id(self, formatter: Any) -> int | None:
        """The id of a formatter's end token in this model; ``None`` where it names none.

        Args:
            formatter: A :class:`~qlora_kit.Formatter`.

        Raises:
            ConfigError: When the tokenizer does not have that token, or the model has no
                embedding for it: an answer could never end.
        """
        end = formatter.template_spec().get("eos_token")
        if end is None:
            return None
        index = self.tokenizer.convert_tokens_to_ids(end)
        is_unknown = index == self.tokenizer.unk_token_id and end != self.tokenizer.unk_token
        if not isinstance(index, int) or is_unknown:
            raise ConfigError(
                f"The formatter ends answers with {end!r}, which is no token of this model's "
                "tokenizer, so that no answer could end.",
                parameter="eos_token",
                value=end,
                advice=(
                    "Make the formatter with model.tokenizer and one of its tokens: ",
                    Setting("eos_token", self.tokenizer.eos_token or ..., "formatter"),
                    ".",
                ),
            )
        rows = self.model.get_input_embeddings().weight.shape[0]
        if index >= rows:
            raise ConfigError(
                f"The formatter ends answers with {end!r}, token {index} of the tokenizer, and the "
                f"model has embeddings for {rows} tokens only.",
                parameter="eos_token",
                value=end,
                advice=(
                    "Resize the checkpoint's embeddings with transformers first, or end answers "
                    "with another token: ",
                    Setting("eos_token", self.tokenizer.eos_token or ..., "formatter"),
                    ".",
                ),
            )
        return index

    def __getattr__(self, name: str) -> Any:
        """Say what does here what a transformers or peft model's method does there."""
        if name in _METHODS:
            kind = type(self).__name__
            raise HandleError(
                f"{'An' if kind[0] in 'AEIOU' else 'A'} {kind} has no {name}: {_METHODS[name]} The "
                "transformers model is model.model."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        quant = self.base.quantization or "not quantized"
        return (
            f"{type(self).__name__}({self.base.name_or_path!r}, {quant}, "
            f"{self.base.compute_dtype}, engine={self.engine.name!r})"
        )


@dataclass(frozen=True, repr=False)
class AdaptedModel(LoadedModel):
    """A base model with a LoRA adapter attached. Unpacks as ``model, tokenizer``.

    Attributes:
        adapter: What was attached.
        trainable_parameters: Number of parameters that train; 0 for inference only.
        total_parameters: Number of parameters of the model, counted unquantized.
        carried_tensors: Tensors of the base that a saved adapter brought along, under the names in
            its file: the embeddings of a vocabulary that was resized, for example.
        start: How the adapter began, where that changed the base's weights; a checkpoint keeps it,
            to make the same base again.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainable_parameters: int = 0
    total_parameters: int = 0
    carried_tensors: tuple[str, ...] = ()
    start: Any = field(default=None, repr=False, compare=False)
