"""What a training and its exports write, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qlora_kit.config import AdapterConfig
from qlora_kit.forecast.shapes import ModelShape
from qlora_kit.pipeline import Pipeline

__all__ = ["forecast_disk"]

#: Tokenizer, configuration and model card.
_BESIDE: Final = 15_000_000

#: Bits a weight of llama.cpp's types, scales included; of mixed ones, of a whole model.
_GGUF_BITS: Final = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.55,
    "q5_1": 6.0, "q5_0": 5.55, "q4_k_m": 4.9, "q4_k_s": 4.65, "q4_1": 5.05, "q4_0": 4.6,
    "q3_k_l": 4.3, "q3_k_m": 3.95, "q3_k_s": 3.55, "q2_k": 3.2,
}  # fmt: skip


def forecast_disk(
    pipeline: Pipeline,
    shape: ModelShape,
    adapter: AdapterConfig,
    steps: int,
    training: Mapping[str, Any],
) -> dict[str, int]:
    """Bytes by what writes them: ``checkpoints``, and each export that is known."""
    trained = shape.count_adapter(adapter)
    disk: dict[str, int] = {}
    if str(training.get("save_strategy", "steps")) != "no":
        every = float(training.get("save_steps", 500))
        every = every * steps if 0 < every < 1 else every
        count = max(1, int(steps / max(1.0, every)))
        kept = min(count, int(training.get("save_total_limit") or count))
        # The adapter in float32, and two states of it at most.
        disk["checkpoints"] = kept * (12 * trained + _BESIDE)
    exports = pipeline.exports
    names = [exports] if isinstance(exports, str) else list(exports)
    tables: Mapping[str, Mapping[str, Any]] = exports if isinstance(exports, Mapping) else {}
    for name in names:
        options = {**pipeline.export_options, **tables.get(name, {})}
        size = _measure(name, options, shape, trained)
        if size is not None:
            disk[name] = size
    return disk


def _measure(name: str, options: Mapping[str, Any], shape: ModelShape, trained: int) -> int | None:
    if name == "lora":
        return 4 * trained + _BESIDE
    if name == "gguf-lora":
        return 2 * trained + _BESIDE
    if name == "merged_16bit":
        return 2 * shape.parameters + _BESIDE
    if name == "merged_4bit":
        return shape.count_weights("nf4", 2) + _BESIDE
    if name == "gguf":
        asked = options.get("quantization") or "q8_0"
        kinds = [asked] if isinstance(asked, str) else list(asked)
        bits = [_GGUF_BITS.get(str(kind).lower(), 16) for kind in kinds]
        return int(sum(bits) / 8 * shape.parameters) + _BESIDE
    return None
