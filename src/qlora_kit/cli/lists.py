"""Which arguments take several values, so that they may be given by comma."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["takes_export_list", "takes_generation_list", "takes_training_list"]

#: Those of ``generate_stream`` and ``GenerationConfig``, which has no annotations.
_GENERATION = frozenset({"stop", "eos_token_id", "suppress_tokens", "begin_suppress_tokens"})


def takes_training_list(name: str) -> bool:
    """Whether a field of ``SFTConfig`` takes a list."""
    return name in _list_training_fields()


def takes_export_list(name: str) -> bool:
    """Whether an option of an installed format takes a list."""
    from qlora_kit.export import describe_exporters

    return any(
        option["name"] == name and any(word in option["type"].lower() for word in ("list", "sequ"))
        for exporter in describe_exporters()["exporters"]
        for option in exporter["options"]
    )


def takes_generation_list(name: str) -> bool:
    """Whether a generation setting takes a list."""
    return name in _GENERATION


@cache
def _list_training_fields() -> frozenset[str]:
    from trl import SFTConfig

    return frozenset(name for name, hint in get_type_hints(SFTConfig).items() if _has_list(hint))


def _has_list(hint: Any) -> bool:
    return get_origin(hint) is list or hint is list or any(map(_has_list, get_args(hint)))
