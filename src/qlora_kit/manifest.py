"""The manifest that every run and every artifact leaves behind.

This module knows the file's name and the parts that runs and artifacts share. What else
goes in is the business of whoever writes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from qlora_kit.handles import AdaptedModel, LoadedModel

__all__ = ["MANIFEST_NAME", "describe_model", "read_manifest", "to_jsonable", "write_manifest"]

MANIFEST_NAME: Final = "qlora_kit_manifest.json"

#: Raised when a reader of an older manifest would misunderstand a newer one.
_SCHEMA: Final = 1


def describe_model(model: LoadedModel) -> dict[str, Any]:
    """The parts of a manifest that say which model, adapter and template it is about."""
    formatter = model.record.formatter
    return {
        "base": to_jsonable(model.base),
        "engine": model.engine.name,
        "max_seq_length": model.max_seq_length,
        "adapter": (
            {
                **to_jsonable(model.adapter),
                "trainable_parameters": model.trainable_parameters,
                "total_parameters": model.total_parameters,
            }
            if isinstance(model, AdaptedModel)
            else None
        ),
        "formatter": None if formatter is None else to_jsonable(formatter.template_spec()),
    }


def write_manifest(folder: Path, kind: str, content: Mapping[str, Any]) -> Path:
    """Write ``qlora_kit_manifest.json``, whole or not at all.

    Args:
        folder: Where to; it exists.
        kind: ``"training"``, ``"checkpoint"`` or ``"artifact"``.
        content: JSON-able, after :func:`to_jsonable`.
    """
    path = folder / MANIFEST_NAME
    manifest = {
        "schema": _SCHEMA,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **content,
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    text = json.dumps(to_jsonable(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, or an empty dictionary when there is none."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def to_jsonable(value: Any) -> Any:
    """A value as JSON can hold it; dataclasses become mappings without their hidden fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # repr=False marks secrets such as tokens as well as bulk.
        return {
            field.name: to_jsonable(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.repr
        }
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
