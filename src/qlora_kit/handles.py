"""Handles of a model in memory: what travels from stage to stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.config import AdapterConfig, LoadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.engines.base import Engine
    from qlora_kit.results import TrainResult

__all__ = ["AdaptedModel", "BaseInfo", "LoadedModel", "RunRecord"]


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
        stop_token_ids: Every token that ends an answer, the end-of-text token first.
    """

    name_or_path: str
    path: Path
    quantization: Literal["nf4", "fp4", "int8"] | None
    compute_dtype: str
    is_prequantized: bool = False
    source: Literal["checkpoint", "gguf"] = "checkpoint"
    stop_token_ids: tuple[int, ...] = ()


@dataclass
class RunRecord:
    """What happened to a model since it was loaded; shared by its handles.

    Attributes:
        formatter: The formatter whose template the model was last trained with.
        training: The result of the last training.
    """

    formatter: Any = None
    training: TrainResult | None = None


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
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainable_parameters: int = 0
    total_parameters: int = 0
