"""Which layers attend to a window only: what configurations say, and what llama.cpp does."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.family import Config, Description

__all__ = ["check_windows", "describe_windows", "list_sliding", "note_sliding_window"]


def note_sliding_window(config: Config, description: Description) -> None:
    """llama.cpp attends to everything in families whose window it does not implement."""
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True)
    if window is not None and is_used and window < description.metadata["context_length"]:
        description.notes.append(
            f"The model attends to the last {window} tokens only; llama.cpp attends to all, so "
            "longer contexts can differ."
        )


def check_windows(config: Config, is_sliding: list[bool]) -> None:
    """Refuse another order of layers than llama.cpp's own, where no key of the file states it."""
    types = config.get("layer_types")
    if types is not None and [kind == "sliding_attention" for kind in types] != is_sliding:
        raise UnsupportedModelError(
            f"llama.cpp does not have this order of sliding and full attention: {types}."
        )


def list_sliding(config: Config, period: int) -> list[bool]:
    """Whether each layer slides; all but every ``period``-th where nothing is said."""
    types: Sequence[str] | None = config.get("layer_types")
    if types is None:
        return [bool((i + 1) % period) for i in range(config.layers)]
    return [kind == "sliding_attention" for kind in types]


def describe_windows(config: Config, description: Description, period: int) -> list[bool]:
    """Write the window and which layers it is for, layer by layer."""
    is_sliding = list_sliding(config, period)
    if any(is_sliding):
        description.metadata |= {
            "attention.sliding_window": int(config.require("sliding_window")),
            "attention.sliding_window_pattern": is_sliding,
        }
    return is_sliding
