"""What a model answers with is what was trained: one rounding per adapted projection.

peft adds the adapter's product to a base product that is rounded to 16 bits already, and loses
most of an update below half a step of that rounding. While a model is read, its adapted
projections compute as in training (:mod:`projection`); weights, parameters and classes stay
as they are, and what the fused step leaves to peft's own modules is left to them here as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from qlora_kit.engines.modules import list_modules
from qlora_kit.engines.native.layers.peft_layers import (
    AdapterPart,
    find_weight_obstacle,
    read_adapter,
    read_group,
)
from qlora_kit.engines.native.layers.projection import project
from qlora_kit.engines.readers import Readers

__all__ = ["is_rounding", "rounding_once"]

#: In wider dtypes the order of additions does not matter, and peft's is kept.
_NARROW: Final = (torch.bfloat16, torch.float16)

# What is put back is a list of modules, those whose ``forward`` was replaced.
_readers: Final[Readers[list[Any]]] = Readers()


def rounding_once(model: Any) -> contextlib.AbstractContextManager[None]:
    """Adapted projections round once; the last of several readers to leave puts peft's back.

    Args:
        model: A transformers or peft model.
    """
    return _readers.reading(model, functools.partial(_replace_forwards, model), _put_back)


def _replace_forwards(model: Any, earlier: list[Any] | None) -> list[Any]:
    if earlier is not None:
        return earlier
    replaced = []
    for module, dtype in _find_modules(model):
        module.forward = functools.partial(_forward, module, module.base_layer, dtype)
        replaced.append(module)
    return replaced


def _put_back(replaced: list[Any]) -> None:
    for module in replaced:
        # Something else may have replaced it since.
        if is_rounding(module.__dict__.get("forward")):
            del module.forward


def _find_modules(model: Any) -> Iterator[tuple[Any, torch.dtype]]:
    """Peft's projections whose base is frozen and readable, and the dtype they compute in."""
    for module in list_modules(model):
        if (
            type(module).__module__.startswith("peft.tuners.lora.")
            and type(module).__name__ in ("Linear", "Linear4bit")
            and "forward" not in module.__dict__
            # accelerate moves the weights of such layers in and out.
            and not hasattr(module.base_layer, "_hf_hook")
            and not any(p.requires_grad for p in module.base_layer.parameters())
        ):
            base = module.base_layer
            dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
            if dtype in _NARROW and find_weight_obstacle(base, dtype) is None:
                yield module, dtype


def is_rounding(forward: Any) -> bool:
    """Whether a module's ``forward`` is the one that :func:`rounding_once` gives it."""
    return isinstance(forward, functools.partial) and forward.func is _forward


def _forward(
    module: Any, base: Any, dtype: torch.dtype, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if x.dtype == dtype and not (args or kwargs or torch.is_grad_enabled()):
        # Asked anew at every call: adapters are disabled, switched and merged at any time.
        adapter = read_adapter(module)
        if isinstance(adapter, AdapterPart) and not (adapter.dropout and module.training):
            rows = x.reshape(-1, x.shape[-1])
            is_row = rows.shape[0] == 1 and x.device.type == "cpu"
            compute = _compute_row if is_row else _compute_rows
            return compute(base, rows, adapter).reshape(*x.shape[:-1], -1)
    out: Tensor = type(module).forward(module, x, *args, **kwargs)
    return out


def _compute_rows(base: Any, x: Tensor, adapter: AdapterPart) -> Tensor:
    """Any number of tokens ``(T, K)`` as in training, shape ``(T, N)``."""
    group = read_group([base], x.dtype)
    assert not isinstance(group, str)
    return project(
        x, group.weights, group.scales, group.rows, group.blocksize, group.quant_type,
        group.bias, adapter.down.to(x.dtype), (adapter.up * adapter.scaling).to(x.dtype),
    )  # fmt: skip


def _compute_row(base: Any, x: Tensor, adapter: AdapterPart) -> Tensor:
    """One token: its update is a bias, which kernels that never dequantize add in float32."""
    linear = torch.nn.functional.linear
    low = linear(x.to(adapter.down.dtype), adapter.down)
    update = (linear(low, adapter.up)[0] * adapter.scaling).to(x.dtype)
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        out: Tensor = linear(x, base.weight, update)
    else:
        import bitsandbytes

        out = bitsandbytes.matmul_4bit(x, base.weight, quant_state=state, bias=update)
    return out if base.bias is None else out + base.bias.to(out.dtype)
