"""The quantizations that a user can ask for by name, as ``llama-quantize`` offers them.

What each stores a tensor in is decided in :mod:`.mixtures`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from qlora_kit.errors import ConfigError, did_you_mean
from qlora_kit.exporters.gguf.quantization.targets import Target, parse_target

__all__ = ["ALIASES", "BLOCK_SIZES", "RECIPES", "Recipe", "find_file_type", "resolve_recipes"]

#: How many numbers share a block, by type: QK_K, QK4_0 and the like of ggml-common.h.
BLOCK_SIZES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F32", "F16", "BF16"), 1),
    **dict.fromkeys(("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"), 32),
    **dict.fromkeys(("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "TQ1_0", "TQ2_0", "IQ4_XS"), 256),
    **dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), 256),
}


@dataclass(frozen=True)
class Recipe:
    """One quantization: what users type, and how llama.cpp numbers it.

    Attributes:
        name: What users type.
        base_type: The type of most matrices, as ``gguf.GGMLQuantizationType`` spells it.
        file_type: llama.cpp's ``general.file_type``.
        output_type: What the output matrix is stored in where the name itself says so.
        embedding_type: The same of the token embeddings.
        target: The size that its types are chosen for, where they are measured.
    """

    name: str
    base_type: str
    file_type: int
    output_type: str | None = None
    embedding_type: str | None = None
    target: Target | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in blocks with scales."""
        return BLOCK_SIZES[self.base_type] > 1


RECIPES: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", "F32", 0),
        Recipe("f16", "F16", 1),
        Recipe("bf16", "BF16", 32),
        Recipe("q8_0", "Q8_0", 7),
        Recipe("q4_0", "Q4_0", 2),
        Recipe("q4_1", "Q4_1", 3),
        Recipe("q5_0", "Q5_0", 8),
        Recipe("q5_1", "Q5_1", 9),
        Recipe("q2_k", "Q2_K", 10),
        Recipe("q2_k_s", "Q2_K", 21),
        # Not llama-quantize's: what people publish under this name has these two in 8 bits.
        Recipe("q2_k_l", "Q2_K", 10, "Q8_0", "Q8_0"),
        Recipe("q3_k_s", "Q3_K", 11),
        Recipe("q3_k_m", "Q3_K", 12),
        Recipe("q3_k_l", "Q3_K", 13),
        Recipe("q4_k_s", "Q4_K", 14),
        Recipe("q4_k_m", "Q4_K", 15),
        Recipe("q5_k_s", "Q5_K", 16),
        Recipe("q5_k_m", "Q5_K", 17),
        Recipe("q6_k", "Q6_K", 18),
        Recipe("iq4_nl", "IQ4_NL", 25),
        Recipe("iq4_xs", "IQ4_XS", 30),
        Recipe("iq3_m", "IQ3_S", 27),
        Recipe("iq3_s", "IQ3_S", 26),
        Recipe("iq3_xs", "IQ3_S", 22),
        Recipe("iq3_xxs", "IQ3_XXS", 23),
        Recipe("iq2_m", "IQ2_S", 29),
        Recipe("iq2_s", "IQ2_XS", 28),
        Recipe("iq2_xs", "IQ2_XS", 20),
        Recipe("iq2_xxs", "IQ2_XXS", 19),
        Recipe("iq1_m", "IQ1_M", 31),
        Recipe("iq1_s", "IQ1_S", 24),
        Recipe("tq1_0", "TQ1_0", 36),
        Recipe("tq2_0", "TQ2_0", 37),
        Recipe("mxfp4_moe", "MXFP4", 38),
    )
}

#: Names that llama.cpp and Unsloth users type as well. ``q3_k_xs`` is what ``iq3_xs`` was called.
ALIASES: Final[Mapping[str, str]] = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q8": "q8_0",
    "q3_k_xs": "iq3_xs",
    "mxfp4": "mxfp4_moe",
}


def resolve_recipes(asked: str | Iterable[str]) -> list[Recipe]:
    """The recipes behind what a user typed, once each, in the order asked.

    Raises:
        ConfigError: When a name is unknown or none was given.
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    if not names:
        raise ConfigError(f"quantization is empty; choose from {', '.join(RECIPES)}.")
    found: dict[str, Recipe] = {}
    for name in names:
        target = parse_target(str(name))
        if target is not None:
            # Planned as what is surely larger, until its types are chosen.
            key = str(name).lower().strip().replace(":", "-")
            found[key] = Recipe(key, "Q8_0", 7, target=target)
            continue
        key = str(name).lower()
        key = ALIASES.get(key, key)
        if key not in RECIPES:
            hint = did_you_mean(key, (*RECIPES, *ALIASES))
            raise ConfigError(
                f"There is no quantization {name!r}.{hint} Known: {', '.join(RECIPES)}, and "
                "'auto:4.5bpw' or 'auto:2GB' for types chosen by what they cost."
            )
        found[key] = RECIPES[key]
    return list(found.values())


def find_file_type(types: Iterable[str]) -> int:
    """llama.cpp's ``general.file_type`` of a mixture: that of the type most matrices have."""
    counts = Counter(kind for kind in types if BLOCK_SIZES[kind] > 1)
    most = counts.most_common(1)[0][0]
    return next(recipe.file_type for recipe in RECIPES.values() if recipe.base_type == most)
