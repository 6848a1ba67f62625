"""Runs what was written in CTranslate2 and says how far it is from what it should compute."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import Check, LoadedModel
from qlora_kit.verification.checks import read_logits
from qlora_kit.verification.original import attach_live_adapters

if TYPE_CHECKING:
    import torch

__all__ = ["check_logits", "check_start_and_end", "find_end_token"]

# How far logits may be from what the merge should compute: root mean square of the difference,
# as a share of their own spread around each position's mean. Rounding to 16 bits stays below 5%
# even beside a live model that computes in bfloat16; another adapter is beyond 100%. int8 rounds
# what flows through the model too: 4% on a random model, 19% on SmolLM2-135M, which then talks
# nonsense.
_LIMIT = 0.1


def check_logits(
    model: LoadedModel,
    folder: Path,
    probes: Sequence[Sequence[int]],
    quantization: str,
    *,
    is_original: bool,
) -> Check:
    """Compare next-token logits over whole probes.

    Args:
        model: The live model.
        folder: What was written.
        probes: Token ids to run both on.
        quantization: How its weights are stored.
        is_original: Whether the merge went into the 16-bit weights that the live base was
            quantized from; those with the live adapter are what to compare with then.
    """
    if is_original:
        expected = read_logits(_load_original(model), probes)
    else:
        with model.engine.inference(model) as live:
            expected = read_logits(live, probes)
    try:
        written = _run(folder, probes, quantization)
    except (RuntimeError, ValueError) as error:
        return Check("logits", False, f"CTranslate2 does not run it: {error}")
    distance, agreement = _measure(expected, written)
    passed = distance <= _LIMIT  # a NaN compares false
    detail = (
        f"differ from the {'original with the adapter' if is_original else 'live model'} by "
        f"{distance:.2%} of their spread (limit {_LIMIT:.0%}); same most likely token at "
        f"{agreement:.1%} of {sum(map(len, probes))} positions"
    )
    if not passed and quantization == "int8":
        detail += ". int8 may be too coarse for this model: quantization='bfloat16' is not"
    value = None if math.isnan(distance) else distance
    return Check("logits", passed, detail, value=value, tolerance=_LIMIT)


def _load_original(model: LoadedModel) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(
        model.base.path, dtype=torch.float32, local_files_only=True
    )
    return attach_live_adapters(model, original).eval()


def check_start_and_end(model: LoadedModel, folder: Path) -> Check:
    """Whether generation ends where the live model's does, without being told."""
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token")
    wanted = find_end_token(model)
    return Check("end token", stated == wanted, f"config.json ends at {stated!r}, live {wanted!r}")


def find_end_token(model: LoadedModel) -> str:
    """The token that ended answers in training, else the tokenizer's."""
    formatter = model.record.formatter
    trained = None if formatter is None else formatter.template_spec().get("eos_token")
    return str(trained or model.tokenizer.eos_token)


def _run(folder: Path, probes: Sequence[Sequence[int]], quantization: str) -> list[torch.Tensor]:
    import ctranslate2
    import numpy as np
    import torch

    generator = ctranslate2.Generator(
        str(folder),
        device="cpu",
        # What CTranslate2 computes in by default on a CPU, without a warning that it has no other.
        compute_type="int8_float32" if quantization == "int8" else "float32",
        intra_threads=torch.get_num_threads(),
    )
    results = []
    for ids in probes:
        output: Any = generator.forward_batch([list(ids)]).to(ctranslate2.DataType.float32)
        results.append(torch.from_numpy(np.array(output)[0]))
    return results


def _measure(
    expected: Sequence[torch.Tensor], written: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Relative distance of logits, and how often the most likely token is the same."""
    import torch

    spread, difference, same = 0.0, 0.0, []
    for live, found in zip(expected, written, strict=True):
        wanted = live - live.mean(-1, keepdim=True)
        # A vocabulary may be padded.
        got = found[:, : live.shape[-1]]
        got = got - got.mean(-1, keepdim=True)
        spread += float(wanted.square().sum())
        difference += float((got - wanted).square().sum())
        same.append(got.argmax(-1) == live.argmax(-1))
    return math.sqrt(difference / spread), float(torch.cat(same).double().mean())
