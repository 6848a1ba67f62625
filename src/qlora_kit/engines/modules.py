"""Every module of a model, quickly: a model with adapters has thousands, and each answer asks."""

from __future__ import annotations

from typing import Any

__all__ = ["list_modules"]


def list_modules(model: Any) -> list[Any]:
    """A model and all modules in it, each once, in the order of ``model.modules()``."""
    found: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [part for part in reversed(module._modules.values()) if part is not None]
    return list(found.values())
