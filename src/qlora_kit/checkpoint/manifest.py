"""The manifest of an export, and the list of its files.

``qlora_kit_manifest.json`` says where an export came from, how it was made and how it was
checked. It holds no token and no training text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from qlora_kit.device import get_versions
from qlora_kit.results import ArtifactFile, LoadedModel, TrainResult, Verification

__all__ = ["MANIFEST_NAME", "describe_options", "list_files", "make_manifest", "write_manifest"]

MANIFEST_NAME: Final = "qlora_kit_manifest.json"

#: Raised when a key changes its meaning.
_MANIFEST_VERSION: Final = 1

_CHUNK: Final = 4 * 1024 * 1024


def list_files(folder: Path, known_sha256: Mapping[str, str] | None = None) -> list[ArtifactFile]:
    """Every file below a folder, sorted by name, hashed unless its hash is known.

    Args:
        folder: The folder.
        known_sha256: Hashes computed while writing, by file name.
    """
    known = known_sha256 or {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(
            lambda pair: known.get(pair[0]) or hash_file(pair[1]), zip(names, paths, strict=True)
        )
        return [
            ArtifactFile(name, path.stat().st_size, digest)
            for name, path, digest in zip(names, paths, hashes, strict=True)
        ]


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def make_manifest(
    model: LoadedModel,
    *,
    format: str,
    options: Any,
    facts: Mapping[str, Any],
    verification: Verification,
    files: list[ArtifactFile],
) -> dict[str, Any]:
    """The manifest as plain data."""
    formatter = model.record.formatter
    adapter = getattr(model, "adapter", None)
    return {
        "manifest_version": _MANIFEST_VERSION,
        "format": format,
        "base": {
            "name_or_path": model.base.name_or_path,
            "path": str(model.base.path),
            "quantization": model.base.quantization,
            "compute_dtype": model.base.compute_dtype,
            "source": model.base.source,
        },
        "engine": model.engine.name,
        "adapter": None if adapter is None else dataclasses.asdict(adapter),
        "formatter": None if formatter is None else dict(formatter.template_spec()),
        "training": _summarize_training(model.record.training),
        "options": describe_options(options),
        "facts": dict(facts),
        "verification": {
            "level": verification.level,
            "passed": verification.passed,
            "checks": [dataclasses.asdict(check) for check in verification.checks],
        },
        "versions": get_versions(),
        "files": [dataclasses.asdict(file) for file in files],
    }


def describe_options(options: Any) -> dict[str, Any]:
    """Options as plain data; fields that are kept out of ``repr`` are secrets and stay out."""
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.repr
    }


def write_manifest(manifest: Mapping[str, Any], folder: Path) -> ArtifactFile:
    """Write the manifest; returns its own entry for the artifact."""
    path = folder / MANIFEST_NAME
    text = json.dumps(_plain(manifest), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return ArtifactFile(MANIFEST_NAME, path.stat().st_size, hash_file(path))


def _summarize_training(result: TrainResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "steps": result.steps,
        "first_loss": result.losses[0] if result.losses else None,
        "last_loss": result.losses[-1] if result.losses else None,
        "eval_losses": result.eval_losses,
        "tokens_seen": result.tokens_seen,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
        "device": result.device,
        "peak_memory_gib": result.peak_memory_gib,
        "trainable_parameters": result.trainable_parameters,
        "optimizer": result.optimizer,
        "was_interrupted": result.was_interrupted,
    }


def _plain(value: Any) -> Any:
    """Only what JSON has: numbers that are not finite become null, everything odd its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
