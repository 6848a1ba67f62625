"""Every module of a model, quickly: a model with adapters has thousands, and each answer asks."""

from __future__ import annotations

from typing import Any

__all__ = ["list_modules"]


def list_modules(model: Any) -> list[Any]:
    """A model and all modules in it, each once, in the order of ``model.modules()``."""
    found: list[Any] = []
    seen: set[Any] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            found.append(module)
            if module._modules:
                waiting += reversed(module._modules.values())
    return found
