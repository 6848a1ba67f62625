"""Reading 4-bit tensors back without bitsandbytes, and comparing them with a second merge.

The decoding follows the file, not the library that wrote it: two values per byte, the
first in the high bits; ``table[code] * scale``; a double-quantized scale is
``nested_table[code] * nested_scale + offset``.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Final

from qlora_kit.results import Check
from qlora_kit.verification.merged_tensors import compare_tensor, pick_rows, recompute_rows
from qlora_kit.weights.nf4 import BLOCK, NESTED_BLOCK, STATE_PIECE, Nf4Weights
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

__all__ = ["compare_quantized_tensors"]

#: Share of 4-bit codes that may differ from a second merge, and then only beside a boundary
#: between two codes: a float32 sum in another order rarely rounds to another 16-bit number.
_CODE_SHARE: Final = 1e-3
#: Half the widest step of the 8-bit table for scales is 0.007 of the largest.
_NESTED_STEP: Final = 0.01

_SPACING: Final = {"torch.bfloat16": 2.0**-7, "torch.float16": 2.0**-10}


def compare_quantized_tensors(
    files: SafetensorsSource, quantized: Nf4Weights, *, whole: bool
) -> list[Check]:
    """Compare every tensor of a 4-bit checkpoint with a second computation.

    Args:
        files: What was written.
        quantized: The tensors it should hold.
        whole: Compare all rows, and every byte with a second quantization, instead of a
            sample of each tensor's rows.

    Returns:
        Two checks: all tensors are there, and they hold the merged weights.
    """
    wanted, found = set(quantized.names()), set(files.names())
    if wanted != found:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        detail = (
            f"{len(missing)} missing and {len(extra)} unexpected, for example "
            f"{(missing + extra)[0]}"
        )
        return [Check("tensors", False, detail)]
    misshapen = [n for n in quantized.names() if files.shape(n) != quantized.shape(n)]
    if misshapen:
        return [Check("tensors", False, f"{misshapen[0]} has shape {files.shape(misshapen[0])}")]
    packed = quantized.quantized_names()
    plain = [name for name in quantized.merged.names() if name not in set(packed)]
    codes = differing = 0
    wrong = [
        name
        for name in plain
        if not compare_tensor(files, quantized.merged, name, whole=whole).agrees
    ]
    for name in packed:
        good, seen, other = _compare_codes(files, quantized, name, whole=whole)
        codes, differing = codes + seen, differing + other
        if not good or (whole and not _equal_bytes(files, quantized, name)):
            wrong.append(name)
    checks = [Check("tensors", True, f"all {len(wanted)} present with their shapes")]
    if wrong:
        adapted = set(quantized.merged.adapted_names())
        detail = (
            f"{len(wanted)} tensors, and {len(wrong)} weights do not hold what the live model "
            f"computes with, for example {wrong[0]}"
            + (", which the adapter changes" if adapted & set(wrong) else "")
        )
    else:
        detail = (
            f"{len(packed)} weights in 4 bits and {len(plain)} in 16; {codes:,} codes decoded and "
            f"compared with a second merge, {differing} beside a boundary differ"
            + ("; every byte as quantized again" if whole else "")
        )
    checks.append(Check("quantized values", not wrong, detail))
    return checks


def _equal_bytes(files: SafetensorsSource, quantized: Nf4Weights, name: str) -> bool:
    import torch

    return all(
        torch.equal(files.load(piece), quantized.load(piece))
        for piece in quantized.piece_names(name)
    )


def _compare_codes(
    files: SafetensorsSource, quantized: Nf4Weights, name: str, *, whole: bool
) -> tuple[bool, int, int]:
    """Whether sampled blocks of a weight hold the merge; codes compared, and codes that differ."""
    seen = differing = 0
    state = json.loads(bytes(files.load(name + STATE_PIECE).tolist()))
    shape = quantized.logical_shape(name)
    if state["shape"] != list(shape) or state["blocksize"] != BLOCK:
        return False, 0, 0
    for start, stop in pick_rows(shape, whole=whole):
        first, last, values = _take_blocks(quantized, name, start, stop)
        good, other = _compare_blocks(files, name, state, first, last, values)
        seen, differing = seen + values.numel(), differing + other
        if not good:
            return False, seen, differing
    return differing <= max(4, seen * _CODE_SHARE), seen, differing


def _take_blocks(
    quantized: Nf4Weights, name: str, start: int, stop: int
) -> tuple[int, int, torch.Tensor]:
    """The blocks that cover some rows: their range, and their values from a second merge."""
    rows, columns = quantized.logical_shape(name)
    merged = quantized.merged
    first, last = start * columns // BLOCK, math.ceil(stop * columns / BLOCK)
    if quantized.layers.is_transposed[name]:
        low, high = 0, rows
        values = recompute_rows(merged, name, 0, columns)[1].T
    else:
        low = first * BLOCK // columns
        high = min(rows, math.ceil(last * BLOCK / columns))
        values = recompute_rows(merged, name, low, high)[1]
    flat = values.to(merged.dtype_of(name)).reshape(-1)
    begin = first * BLOCK - low * columns
    return first, last, flat[begin : begin + (last - first) * BLOCK]


def _compare_blocks(
    files: SafetensorsSource,
    name: str,
    state: dict[str, float],
    first: int,
    last: int,
    values: torch.Tensor,
) -> tuple[bool, int]:
    """Whether the codes and scales of some blocks fit their values; codes that differ."""
    import torch

    spacing = _SPACING[str(values.dtype)]
    padded = torch.nn.functional.pad(values.float(), (0, (last - first) * BLOCK - len(values)))
    blocks = padded.view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)

    scales = files.load_rows(f"{name}.absmax", first, last)
    tolerance = spacing * largest
    if "nested_offset" in state:
        table = files.load(f"{name}.nested_quant_map")
        nested = files.load(f"{name}.nested_absmax")[torch.arange(first, last) // NESTED_BLOCK]
        scales = table[scales.int()] * nested + state["nested_offset"]
        tolerance = tolerance + _NESTED_STEP * nested
    # NaN on either side compares false.
    if not bool(((scales - largest).abs() <= tolerance + 1e-12).all()):
        return False, 0

    table = files.load(f"{name}.quant_map")
    boundaries = (table[1:] + table[:-1]) / 2
    scaled = (blocks / largest.clamp(min=1e-38)[:, None]).reshape(-1)[: len(values)]
    expected = torch.bucketize(scaled, boundaries)
    pairs = files.load_rows(name, first * BLOCK // 2, last * BLOCK // 2).reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[: len(values)].long()
    other = codes != expected
    # The nearest boundary is the one between the two codes, when they are neighbours.
    crossed = boundaries[torch.minimum(codes, expected).clamp(max=len(boundaries) - 1)]
    is_close = (scaled - crossed).abs() <= 2 * spacing * scaled.abs() + 1e-5
    is_close &= (codes - expected).abs() <= 1
    return bool((~other | is_close).all()), int(other.sum())
