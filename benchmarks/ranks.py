"""Training speed over several cards: one line of JSON per run, from the main rank.

    python benchmarks/ranks.py --make FOLDER --tokenizer TOKENIZER_FOLDER
    python benchmarks/ranks.py FOLDER --rows 8
    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py FOLDER --packed 16384

Rows are random token ids with the lengths of an instruction data set (lognormal, median 200).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--make", type=Path, help="write a random model of --shape and stop")
    parser.add_argument("--shape", default="qwen3-4b")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="rows per card and step")
    parser.add_argument("--packed", type=int, default=0, help="tokens per packed row")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--draws", type=int, default=16_000, help="rows of the data")
    parser.add_argument("--plan", default="null", help="as JSON")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output", default="ranks_output")
    parser.add_argument("--save", action="store_true", help="save, and export the adapter")
    options = parser.parse_args()
    if options.make:
        from random_model import make_random_model

        make_random_model(options.shape, options.tokenizer, options.make)
        return
    _train(options)


def draw_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, a third of each a prompt."""
    import numpy as np

    draws = np.random.default_rng(0)
    rows = []
    for length in np.clip(draws.lognormal(5.3, 0.6, count), 24, 2048).astype(int):
        ids = draws.integers(1000, 100_000, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def _train(options: argparse.Namespace) -> None:
    import torch
    from transformers import TrainerCallback

    from qlora_kit import attach_lora, export_model, load_quantized, train_sft
    from qlora_kit.engines.native.sharding.shards import held_bytes

    ends: list[float] = []
    held: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if not held:
                held.append(held_bytes(model.model))

    rows = draw_rows(options.draws)
    plan = json.loads(options.plan)
    shard = (plan or {}).get("shard", "auto")
    began = time.perf_counter()
    loaded = load_quantized(options.model, max_seq_length=2048, shard=shard)
    if torch.cuda.is_available():
        load_peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    else:
        load_peak = 0.0
    load_seconds = time.perf_counter() - began
    model = attach_lora(loaded, r=16, lora_alpha=16)
    layout = {"packing": True, "max_length": options.packed} if options.packed else {}
    started = time.perf_counter()
    result = train_sft(
        model, rows, max_steps=options.steps, per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=1, output_dir=options.output, report_to="none",
        save_strategy="no", disable_tqdm=True, callbacks=[Clock()], plan=plan,
        resume_from_checkpoint=options.resume or None, **layout,
    )  # fmt: skip
    if options.save and not result.was_interrupted:
        artifact = export_model(model, "lora", f"{options.output}/exported", overwrite=True)
        print(f"rank {os.environ.get('RANK', '0')}: {artifact.path}", flush=True)
    if os.environ.get("RANK", "0") != "0":
        return
    warm = max(len(ends) // 3, 1)
    rest = sorted(b - a for a, b in zip(ends[warm:], ends[warm + 1 :], strict=False)) or [0.0]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(
        "RANKS "
        + json.dumps(
            {
                "world": int(os.environ.get("WORLD_SIZE", "1")), "rows": options.rows,
                "packed": options.packed, "plan": result.plan[:100], "steps": result.steps,
                "median_ms": round(1000 * rest[len(rest) // 2], 1),
                "tokens_per_second": round(
                    result.tokens_seen / max(len(ends), 1) * len(rest) / max(sum(rest), 1e-9)
                ),
                "first_step_s": round(ends[0] - started, 1), "peak_gib": round(peak, 1),
                "load_s": round(load_seconds, 1), "load_peak_gib": round(load_peak, 1),
                "layers_gib": round(held[0] / 2**30, 2),
                "interrupted": result.was_interrupted, "checkpoint": str(result.checkpoint),
                "losses": [round(loss, 4) for loss in (*result.losses[:3], *result.losses[-2:])],
            }
        ),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
