"""An importance matrix collected in torch, while the live model reads some texts.

llama.cpp's ``llama-imatrix`` watches matrix products of a running file; here modules of the
live model are watched, adapters and all, under the names that the file will have.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ExportError, UnsupportedModelError
from qlora_kit.exporters.gguf.calibration.examples import CalibrationExamples
from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor, plan_tensors
from qlora_kit.exporters.gguf.conversion.text_model import TextSource
from qlora_kit.exporters.gguf.families.table import read_family
from qlora_kit.exporters.gguf.quantization.importance import Importance, ImportanceMatrix
from qlora_kit.exporters.gguf.quantization.mixtures import allows_quantization
from qlora_kit.handles import LoadedModel
from qlora_kit.weights.live import collect_live_tensors, get_hf_model

if TYPE_CHECKING:
    import torch

__all__ = ["collect_importance", "run_examples"]

logger = logging.getLogger(__name__)

#: What llama-imatrix calls a chunk, in tokens; what is written is counted in them.
_CHUNK = 512


@dataclass
class _Sums:
    """Squared inputs of one module, by matrix: experts have several."""

    values: torch.Tensor
    counts: torch.Tensor


@dataclass
class _Watch:
    """What is being collected.

    Attributes:
        sums: By the module's name, and for experts by the projection.
        failed: What a hook could not make sense of.
    """

    sums: dict[tuple[str, str], _Sums] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, key: tuple[str, str], rows: torch.Tensor, matrix: int, count: int) -> None:
        """Add rows of inputs, shape (tokens, columns)."""
        import torch

        if key not in self.sums:
            self.sums[key] = _Sums(
                torch.zeros(count, rows.shape[-1], dtype=torch.float64),
                torch.zeros(count, dtype=torch.int64),
            )
        found = self.sums[key]
        # Squared in float32 on the device, added up in float64 beside it.
        found.values[matrix] += rows.float().square().sum(0).double().cpu()
        found.counts[matrix] += rows.shape[0]


def collect_importance(
    model: LoadedModel,
    examples: CalibrationExamples,
    progress: Callable[[str, int, int], None],
) -> ImportanceMatrix:
    """Run the examples through the live model and add up the squares of every matrix's inputs.

    Raises:
        ExportError: When the model computes numbers that are not finite.
        UnsupportedModelError: When some matrix's inputs cannot be seen.
    """
    import numpy as np

    places = _find_places(model)
    watch = _Watch()
    with _watching(model, watch, {key for _, key in places}):
        for done, _ in enumerate(run_examples(model, examples.token_ids), start=1):
            progress("collecting the importance matrix", done, len(examples.token_ids))
    if watch.failed:
        raise UnsupportedModelError(
            f"The inputs of {watch.failed[0]} cannot be seen in this model, so no importance "
            "matrix can be collected from it. Give one that llama-imatrix wrote."
        )
    entries = {}
    for tensor, key in places:
        name, found = tensor.name, watch.sums.get(key)
        if found is None:
            continue
        values = (
            found.values if tensor.reorder_columns is None else tensor.reorder_columns(found.values)
        )
        sums = values.numpy().astype(np.float32)
        if not np.isfinite(sums).all():
            raise ExportError(f"The inputs of {name} are not finite: training has diverged.")
        entries[name] = Importance(sums, found.counts.numpy())
    logger.info(
        "Collected the importance of %d matrices over %s tokens of %s.",
        len(entries), f"{examples.tokens:,}", examples.origin,
    )  # fmt: skip
    chunks = max(1, examples.tokens // _CHUNK)
    return ImportanceMatrix(entries, (examples.origin,), chunks, _CHUNK)


def run_examples(model: LoadedModel, token_ids: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """The live model's logits, example by example, shape (tokens, vocabulary)."""
    import torch

    with model.engine.inference(model) as live, torch.no_grad():
        device = next(model.model.parameters()).device
        for ids in token_ids:
            batch = torch.tensor([list(ids)], device=device)
            yield live(batch, use_cache=False).logits[0]


class _LiveShapes:
    """The live model's tensors as a source of names and shapes."""

    def __init__(self, model: LoadedModel) -> None:
        self._live = collect_live_tensors(model.model)

    def names(self) -> Sequence[str]:
        return list(self._live)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._live[name].shape

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError("names and shapes only")

    def close(self) -> None:
        """Nothing is open."""


def _find_places(model: LoadedModel) -> list[tuple[PlannedTensor, tuple[str, str]]]:
    """The module, and for experts the projection, behind every matrix of the file's blocks."""
    config = get_hf_model(model.model).config.to_dict()
    family, wrapped = read_family(config)
    text = TextSource(_LiveShapes(model))
    planned = plan_tensors(text, family, wrapped, family.describe_model(wrapped))
    places = []
    for tensor in map(text.plan, planned):
        if not tensor.name.startswith("blk.") or not allows_quantization(tensor.name, tensor.shape):
            continue
        module, _, part = tensor.sources[0].rpartition(".")
        places.append((tensor, (module, "" if part == "weight" else part)))
    return places


@contextlib.contextmanager
def _watching(model: LoadedModel, watch: _Watch, keys: set[tuple[str, str]]) -> Iterator[None]:
    modules = dict(get_hf_model(model.model).named_modules())
    by_module: dict[str, set[str]] = {}
    for module, part in keys:
        by_module.setdefault(module, set()).add(part)
    handles = []
    try:
        for name, parts in by_module.items():
            found = modules.get(name)
            if found is None:
                watch.failed.append(name)
            elif parts == {""}:
                handles.append(found.register_forward_pre_hook(_watch_rows(watch, name)))
            else:
                # Inside of peft's wrappers, where an adapter's update is in the weights.
                while hasattr(found, "base_layer"):
                    found = found.base_layer
                hook = _watch_experts(watch, name, parts)
                handles.append(found.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_rows(watch: _Watch, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach()
        watch.add((name, ""), rows.reshape(-1, rows.shape[-1]), 0, 1)

    return look


def _watch_experts(
    watch: _Watch, name: str, parts: set[str]
) -> Callable[[Any, tuple[Any, ...]], None]:
    """Experts that transformers keeps in one module (``integrations/moe.py``)."""

    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        import torch

        is_known = hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate")
        if not is_known or len(inputs) < 2 or not module.gate_up_proj.is_floating_point():
            watch.failed.append(name)
            return
        states, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
        chosen = chosen.reshape(states.shape[0], -1)
        count = module.gate_up_proj.shape[0]
        is_transposed = bool(getattr(module, "is_transposed", False))
        for expert in torch.unique(chosen).tolist():
            if expert >= count:  # a place that is masked
                continue
            rows = states[(chosen == expert).any(-1)]
            weight = module.gate_up_proj[expert]
            product = rows @ (weight if is_transposed else weight.T)
            if getattr(module, "has_bias", False):
                product = product + module.gate_up_proj_bias[expert]
            inner = module._apply_gate(product)
            for part in parts:
                seen = inner if part == "down_proj" else rows
                watch.add((name, part), seen, expert, count)

    return look
