"""A second computation of merged tensors, for checking the first.

Rows are computed on their own from the base and the factors, in another order of
operations than :mod:`qlora_kit.weights.merged`, and compared with what lies on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qlora_kit.engines.base_model import match_tensors
from qlora_kit.results import Check
from qlora_kit.weights.live import LiveTensor
from qlora_kit.weights.merged import MergedWeights
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

__all__ = [
    "TensorComparison",
    "check_architecture",
    "compare_merged_tensors",
    "compare_tensor",
    "pick_rows",
    "recompute_rows",
]

#: Rows compared per tensor unless all are: at the beginning, in the middle and at the end.
_SAMPLE_ROWS: Final = 16

#: Relative spacing of numbers; a float32 sum in another order may round to the next one.
_SPACING: Final = {"torch.bfloat16": 2.0**-7, "torch.float16": 2.0**-10, "torch.float32": 1e-5}


def check_architecture(folder: Path, *, trust_remote_code: bool) -> Check | None:
    """Whether the files hold each tensor of the model that their ``config.json`` describes.

    What should be there is asked of the architecture, and not of whoever wrote it.

    Args:
        folder: A checkpoint.
        trust_remote_code: Run Python code that the checkpoint ships.

    Returns:
        The failed check; ``None`` where nothing is missing, or where it cannot be told without
        the numbers.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
    is_packed = getattr(config, "quantization_config", None) is not None
    found = match_tensors(folder, config, trust_remote_code=trust_remote_code)
    if found is None:
        return None
    for what, key in (("missing", "missing_keys"), ("misshapen", "mismatched_keys")):
        # Packed weights have a shape of their own.
        wrong = sorted(found[key]) if what == "missing" or not is_packed else []
        if wrong:
            name = wrong[0] if isinstance(wrong[0], str) else wrong[0][0]
            detail = f"{len(wrong)} of the architecture's tensors are {what}, for example {name}"
            return Check("tensors", False, detail)
    return None


def compare_merged_tensors(
    files: SafetensorsSource, merged: MergedWeights, *, whole: bool
) -> list[Check]:
    """Compare every tensor on disk with a second computation.

    Args:
        files: What was written.
        merged: The merge it should hold.
        whole: Compare all rows instead of a sample of each tensor.

    Returns:
        Two checks: all tensors are there, and adapted ones hold the adapter and others the base.
    """
    wanted, found = set(merged.names()), set(files.names())
    if wanted != found:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        return [
            Check(
                "tensors",
                False,
                f"{len(missing)} missing and {len(extra)} unexpected, for example "
                f"{(missing + extra)[0]}",
            )
        ]
    misshapen = [n for n in merged.names() if files.shape(n) != merged.shape(n)]
    if misshapen:
        return [Check("tensors", False, f"{misshapen[0]} has shape {files.shape(misshapen[0])}")]
    adapted = merged.adapted_names()
    compared = {name: compare_tensor(files, merged, name, whole=whole) for name in merged.names()}
    wrong = [name for name, result in compared.items() if not result.agrees]
    changed = [name for name, result in compared.items() if result.differs_from_base]
    rows_compared = sum(result.rows for result in compared.values())
    checks = [Check("tensors", True, f"all {len(wanted)} present with their shapes")]
    if wrong:
        is_base = any(name in adapted for name in wrong)
        detail = (
            f"{len(wrong)} of {len(wanted)} do not hold what the live model computes with, for "
            f"example {wrong[0]}" + (", which the adapter changes" if is_base else "")
        )
    else:
        detail = (
            f"{len(changed)} of {len(adapted)} adapted tensors differ from the base, the other "
            f"{len(wanted) - len(adapted)} do not; {rows_compared:,} rows computed twice"
        )
    checks.append(Check("merged values", not wrong, detail))
    return checks


@dataclass(frozen=True)
class TensorComparison:
    """What comparing one tensor showed.

    Attributes:
        agrees: Whether the rows on disk are those of the second computation.
        differs_from_base: Whether they differ from the base without the adapter.
        rows: How many were compared.
    """

    agrees: bool
    differs_from_base: bool
    rows: int


def compare_tensor(
    files: SafetensorsSource, merged: MergedWeights, name: str, *, whole: bool
) -> TensorComparison:
    """Compare one tensor on disk with a second computation of it."""
    differs, rows = False, 0
    for start, stop in pick_rows(merged.shape(name), whole=whole):
        written = files.load_rows(name, start, stop)
        base, expected = recompute_rows(merged, name, start, stop)
        rows += stop - start
        if not _agree(written, expected):
            return TensorComparison(False, differs, rows)
        differs = differs or not _agree(written, base, spacing=0.0)
    return TensorComparison(True, differs, rows)


def pick_rows(shape: tuple[int, ...], *, whole: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows to compare: all, or some at the beginning, in the middle and at the end."""
    rows = shape[0] if shape else 0
    if whole or rows <= 3 * _SAMPLE_ROWS:
        yield 0, rows
        return
    for start in (0, (rows - _SAMPLE_ROWS) // 2, rows - _SAMPLE_ROWS):
        yield start, start + _SAMPLE_ROWS


def recompute_rows(
    merged: MergedWeights, name: str, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows without and with the adapter, unrounded."""
    live = merged.live(name)
    base = merged.load_base_rows(name, start, stop)
    if live is not None and live.tokens is not None:
        total = base.float().clone()
        for index, row in live.replaced_rows():
            if start <= index < stop:
                total[index - start] = row.detach().float().cpu()
        return base, total
    if live is None or not live.adapters:
        return base, base
    if live.is_parameter:
        total = merged.take_piece(name, "again", _recompute_stack)
        return base, total.cpu()[start:stop]
    if live.key == "bias":
        total = base.float()
        for adapter in live.adapters:
            total = (
                total
                + live.layer.scaling[adapter]
                * (live.layer.lora_B[adapter].bias.detach().float().cpu()[start:stop])
            )
        return base, total
    return base, _recompute_weight_rows(merged, live, base, start, stop)


def _recompute_stack(live: LiveTensor) -> torch.Tensor:
    """A parameter with its update, expert by expert."""
    total = live.tensor.detach().float().clone()
    stack = total if total.dim() == 3 else total[None]
    for adapter in live.adapters:
        a = live.layer.lora_A[adapter].weight.detach().float()
        b = live.layer.lora_B[adapter].weight.detach().float()
        count = len(stack)
        rank = a.shape[0] // count
        for index, expert in enumerate(stack):
            # A's rows lie expert by expert, B's columns rank by rank.
            update = b[:, index::count] @ a[index * rank : (index + 1) * rank]
            is_turned = total.dim() == 3 and not live.layer._did_swap_in_out_features
            expert.add_(update.T if is_turned else update, alpha=live.layer.scaling[adapter])
    return total


def _recompute_weight_rows(
    merged: MergedWeights, live: LiveTensor, base: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    total = base.float()
    rows_are_inputs = live.is_transposed
    for adapter in live.adapters:
        a, b = live.factors(adapter)
        a, b = a.float().cpu(), b.float().cpu()
        delta = (a[:, start:stop].T @ b.T) if rows_are_inputs else (b[start:stop] @ a)
        total = total + delta * live.layer.scaling[adapter]
    if live.is_dora:
        magnitude = live.layer.lora_magnitude_vector[live.adapters[0]].weight.detach().float().cpu()
        magnitude = magnitude.reshape(-1)
        if rows_are_inputs:
            # The norm runs over all rows, so it cannot be had from a few of them.
            norm = merged.merge_without_dora(live).cpu().norm(dim=0)
            total = total * (magnitude / norm)[None, :]
        else:
            total = total * (magnitude[start:stop] / total.norm(dim=1))[:, None]
    return total


def _agree(written: torch.Tensor, expected: torch.Tensor, spacing: float | None = None) -> bool:
    """Whether two tensors are equal but for the last place in the written dtype."""
    import torch

    if not written.is_floating_point():
        return bool(torch.equal(written, expected))
    if spacing is None:
        spacing = _SPACING.get(str(written.dtype), 1e-5)
    wide = expected.to(written.dtype).float() if spacing == 0.0 else expected.float()
    difference = (written.float() - wide).abs()
    # NaN on either side compares false.
    return bool((difference <= spacing * wide.abs() + (1e-7 if spacing else 0.0)).all())
