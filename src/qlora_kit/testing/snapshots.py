"""What a model and a folder are at one moment, to see what changed in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_kit.handles import LoadedModel

__all__ = ["fingerprint_model", "snapshot_tree"]


def snapshot_tree(folder: Path, but: str | None = None) -> dict[str, tuple[int, int]]:
    """Size and time of modification of everything in a folder, by path.

    Args:
        folder: The folder.
        but: A name in it to leave out.
    """
    found = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if relative.parts[0] != but:
            status = path.stat()
            # A folder's time changes with what is written beside the destination.
            is_file = path.is_file()
            found[str(relative)] = (status.st_size, status.st_mtime_ns) if is_file else (0, 0)
    return found


def fingerprint_model(model: LoadedModel) -> dict[str, str]:
    """A hash of every tensor of a model, and its settings, by name."""
    module = model.model
    found = {
        "configuration": json.dumps(module.config.to_dict(), default=str, sort_keys=True),
        "generation settings": str(module.generation_config),
        "tokenizer": f"{model.tokenizer!r} {model.tokenizer.chat_template}",
    }
    for name, part in module.named_modules():
        found[f"{name}.training"] = str(part.training)
    for name, parameter in module.named_parameters():
        found[name] = f"{_hash(parameter)} {parameter.requires_grad}"
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[f"{name}.absmax"] = _hash(state.absmax)
    found |= {name: _hash(buffer) for name, buffer in module.named_buffers()}
    return found


def _hash(tensor: Any) -> str:
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
