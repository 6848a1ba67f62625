"""Rotary embeddings as a configuration states them, and as llama.cpp wants to be told.

Reads both transformers 4 (``rope_theta`` and ``rope_scaling``) and transformers 5
(``rope_parameters``) configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from qlora_kit.errors import UnsupportedModelError

__all__ = ["Rope", "describe_rope", "read_rope"]

_SUPPORTED: Final = ("default", "linear", "llama3", "yarn", "longrope", "proportional")

#: What a frequency is divided by so that nothing turns.
_NEVER: Final = 1e30


@dataclass(frozen=True)
class Rope:
    """One kind of rotary embedding.

    Attributes:
        kind: ``"default"``, ``"linear"``, ``"llama3"``, ``"yarn"``, ``"longrope"`` or
            ``"proportional"``.
        theta: The base wavelength.
        parameters: Everything else the configuration says about it.
    """

    kind: str
    theta: float
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def require(self, key: str) -> Any:
        """A parameter that this kind cannot do without.

        Raises:
            UnsupportedModelError: When the configuration does not have it.
        """
        value = self.parameters.get(key)
        if value is None:
            raise UnsupportedModelError(
                f"The configuration asks for {self.kind!r} rotary embeddings without {key!r}. "
                "Complete rope_parameters (or rope_scaling) in config.json."
            )
        return value


def read_rope(
    config: Mapping[str, Any], layer_type: str | None = None, default_theta: float = 10000.0
) -> Rope:
    """The rotary embedding of a model, or of its layers of one type.

    Args:
        config: A model's configuration, of transformers 4 or 5.
        layer_type: ``"full_attention"`` or ``"sliding_attention"`` where they differ.
        default_theta: The family's base where the configuration names none.

    Raises:
        UnsupportedModelError: When the scaling is of a kind that llama.cpp does not have.
    """
    stated = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layer_type is not None and isinstance(stated.get(layer_type), Mapping):
        stated = dict(stated[layer_type])
    elif any(isinstance(value, Mapping) for value in stated.values()):
        raise UnsupportedModelError(
            f"rope_parameters differ by layer type ({', '.join(stated)}), which this family "
            "does not have in llama.cpp."
        )
    kind = str(stated.pop("rope_type", None) or stated.pop("type", None) or "default")
    stated.pop("type", None)
    kind = {"su": "longrope"}.get(kind, kind)
    theta = float(stated.pop("rope_theta", None) or config.get("rope_theta") or default_theta)
    if kind not in _SUPPORTED:
        raise UnsupportedModelError(
            f"llama.cpp has no rotary scaling of kind {kind!r} (it has {', '.join(_SUPPORTED)}). "
            "Export with 'merged_16bit' and run it with transformers or vLLM."
        )
    if kind != "default" and stated.get("original_max_position_embeddings") is None:
        original = config.get("original_max_position_embeddings")
        if original is not None:
            stated["original_max_position_embeddings"] = original
    return Rope(kind, theta, stated)


def describe_rope(
    rope: Rope, dimensions: int, context_length: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What the file says of a rotary embedding.

    Args:
        rope: The embedding.
        dimensions: How many of a head's dimensions rotate.
        context_length: Longest sequence of the model, in tokens.

    Returns:
        Metadata under keys without the architecture prefix, and tables of
        ``dimensions / 2`` divisors by tensor name.

    Raises:
        UnsupportedModelError: When a parameter is missing or has no counterpart.
    """
    metadata: dict[str, Any] = {"rope.dimension_count": dimensions, "rope.freq_base": rope.theta}
    match rope.kind:
        case "linear":
            metadata["rope.scaling.type"] = "linear"
            metadata["rope.scaling.factor"] = float(rope.require("factor"))
        case "yarn":
            metadata |= _describe_yarn(rope, context_length)
        case "llama3":
            return metadata, {"rope_freqs.weight": _llama3_divisors(rope, dimensions)}
        case "proportional":
            return metadata, {"rope_freqs.weight": _proportional_divisors(rope, dimensions)}
        case "longrope":
            return _describe_longrope(rope, metadata, dimensions, context_length)
    return metadata, {}


def _describe_yarn(rope: Rope, context_length: int) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071); llama.cpp multiplies its own 0.1 ln(s) + 1 into the factor.

    ``yarn_attn_factor`` would be the obvious key, and is overwritten by llama.cpp; ``attn_factor``
    is multiplied in.
    """
    if not rope.parameters.get("truncate", True):
        raise UnsupportedModelError(
            "YaRN with truncate=False has no counterpart in llama.cpp, which always rounds the "
            "correction range."
        )
    betas = (rope.parameters.get("beta_fast") or 32, rope.parameters.get("beta_slow") or 1)
    if betas != (32, 1):
        # The format has keys for them, but llama.cpp does not read them for these families.
        raise UnsupportedModelError(
            f"YaRN with beta_fast={betas[0]} and beta_slow={betas[1]}: llama.cpp uses 32 and 1 for "
            "this family. Export with 'merged_16bit' and run it with transformers or vLLM."
        )
    original = int(rope.require("original_max_position_embeddings"))
    factor = float(rope.parameters.get("factor") or context_length / original)
    # What rope_yarn (ggml-cpu/ops.cpp) multiplies in by itself. llama-context.cpp ends with
    # yarn_attn_factor *= rope_attn_factor, the key written below, which therefore has to be what
    # the model wants divided by that.
    own = _mscale(factor, 1.0)
    wanted = rope.parameters.get("attention_factor")
    if wanted is None:
        scale, all_dim = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
        wanted = (
            _mscale(factor, float(scale)) / _mscale(factor, float(all_dim))
            if scale and all_dim
            else own
        )
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(wanted) / own,
    }


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3_divisors(rope: Rope, dimensions: int) -> list[float]:
    """Divisors of the frequencies, as transformers' ``_compute_llama3_parameters``."""
    factor = float(rope.require("factor"))
    low, high = float(rope.require("low_freq_factor")), float(rope.require("high_freq_factor"))
    original = float(rope.require("original_max_position_embeddings"))
    # One divisor per pair of dimensions, (D / 2,). Waves shorter than original / high go round
    # many times within the trained length and stay; those longer than original / low are slowed
    # by the factor; between them it fades. ggml divides the angle by them (rope's freq_factors),
    # so this is the inverse of the frequencies' change. conversion/llama.py computes in float32
    # where this is float64: the last bit of a divisor may differ.
    divisors = []
    for index in range(0, dimensions, 2):
        wavelength = 2 * math.pi * rope.theta ** (index / dimensions)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _proportional_divisors(rope: Rope, dimensions: int) -> list[float]:
    """A part of a head turns, with the frequencies that all of it would have."""
    if rope.parameters.get("factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            "llama.cpp does not scale 'proportional' rotary embeddings by a factor."
        )
    part = float(rope.parameters.get("partial_rotary_factor", 1.0))
    turning = int(dimensions * part / 2)
    return [1.0] * turning + [_NEVER] * (dimensions // 2 - turning)


def _describe_longrope(
    rope: Rope, metadata: dict[str, Any], dimensions: int, context_length: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """LongRoPE (arXiv:2402.13753): two tables, chosen by the length of the context."""
    original = int(rope.require("original_max_position_embeddings"))
    factor = float(rope.parameters.get("factor") or context_length / original)
    # sqrt(1 + ln s / ln L) where the configuration states none, as transformers'
    # _compute_longrope_parameters and conversion/phi.py have it.
    attention = rope.parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    tables = {
        "rope_factors_long.weight": [float(value) for value in rope.require("long_factor")],
        "rope_factors_short.weight": [float(value) for value in rope.require("short_factor")],
    }
    for name, table in tables.items():
        if len(table) != dimensions // 2:
            raise UnsupportedModelError(
                f"{name} has {len(table)} factors where {dimensions // 2} dimensions rotate."
            )
    metadata |= {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(attention),
    }
    return metadata, tables
