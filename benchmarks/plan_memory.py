"""Whether what a plan predicts bounds what a training takes: GiB predicted, allocated, reserved.

    python benchmarks/plan_memory.py --model FOLDER --data rows.json --out results
    python benchmarks/plan_memory.py --shape qwen3-4b --tokenizer FOLDER --data rows.json

A process per line: a few steps of a pinned plan, or of the automatic one on a card of which only
some GiB may be used. ``--shape`` makes the model first, with random weights, as ``train.py`` does.
Figures are beyond the loaded model, as predictions are; ``within`` says whether what was reserved
lies between 90% and 100% of what was predicted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

from model_shapes import SHAPES  # noqa: E402
from train import start_worker  # noqa: E402

_GIB = 1024**3


@dataclass(frozen=True)
class Line:
    """A training to measure.

    Attributes:
        name: What it is called in the table.
        batch: Rows per step.
        length: Tokens of a packed row; 0 for one example per row.
        plan: What is pinned.
        card_gib: Most GiB that may be used of the card; 0 for all of it.
        settings: Of ``train_sft`` and, under ``"r"``, of ``attach_lora``.
        filled: Fills every row up with this many tokens, for examples of one length.
    """

    name: str
    batch: int
    length: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    card_gib: float = 0
    settings: dict[str, Any] = field(default_factory=dict)
    filled: int = 0


def _pin(checkpointing: str, weights: str, micro: int | None = None, **more: Any) -> dict[str, Any]:
    tokens = {} if micro is None else {"micro_batch_tokens": micro}
    return {"checkpointing": checkpointing, "weights": weights, **tokens, **more}


#: What CUDA reports of cards sold as 80, 24 and 12 GB.
_H100, _RTX_4090, _RTX_3060 = 79.1, 23.5, 11.6

LINES = (
    Line("classic none cache graphs", 8, plan=_pin("none", "cache")),
    Line("classic none nf4 graphs", 8, plan=_pin("none", "nf4")),
    Line("classic none nf4 plain", 8, plan=_pin("none", "nf4", cuda_graphs=False)),
    Line("packed 16384 none nf4", 1, 16384, _pin("none", "nf4")),
    Line("packed 16384 none cache", 1, 16384, _pin("none", "cache")),
    Line("packed 16384 half nf4", 1, 16384, _pin("selective", "nf4", checkpointed_layers=18)),
    Line("packed 16384 full nf4", 1, 16384, _pin("full", "nf4")),
    Line("packed 4 x 4096 none nf4", 4, 4096, _pin("none", "nf4", 4096)),
    Line("packed 4 x 4096 full nf4", 4, 4096, _pin("full", "nf4", 4096)),
    Line("packed 8 x 2048 full cache", 8, 2048, _pin("full", "cache", 2048)),
    Line("rank 256, full Adam", 8, settings={"r": 256, "optim": "adamw_torch"}),
    Line("automatic, all of it, 16384", 1, 16384),
    Line("automatic, 80 GB, 16384", 1, 16384, card_gib=_H100),
    Line("automatic, 80 GB, one example of 32768", 1, filled=32768, card_gib=_H100),
    Line("automatic, 80 GB, classic", 8, card_gib=_H100),
    Line("automatic, 24 GB, 16384", 1, 16384, card_gib=_RTX_4090),
    Line("automatic, 24 GB, classic", 8, card_gib=_RTX_4090),
    Line("automatic, 12 GB, 8 x 2048", 8, 2048, card_gib=_RTX_3060),
    Line("automatic, 12 GB, classic", 8, card_gib=_RTX_3060),
)


def main() -> None:
    options = _parse()
    if options.worker:
        job = json.loads(Path(options.worker).read_text(encoding="utf-8"))
        Path(job["result"]).write_text(json.dumps(_measure(job)), encoding="utf-8")
        return
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = _prepare(options, out)
    chosen = [one for one in LINES if not options.lines or one.name in options.lines]
    found = []
    for line in chosen:
        result_file = out / "plan_memory_line.json"
        result_file.unlink(missing_ok=True)
        job = {"line": asdict(line), "facts": facts, "steps": options.steps, "work": str(out)}
        job["result"] = str(result_file)
        log = out / f"plan_memory-{line.name.replace(' ', '-').replace(',', '')}.log"
        begun = time.perf_counter()
        failure = start_worker(job, log, options.timeout, HERE)
        result = json.loads(result_file.read_text()) if result_file.is_file() else {}
        found.append({"line": line.name, "error": failure, **result})
        print(f"{_render_line(found[-1])} {time.perf_counter() - begun:.0f} s", flush=True)
        report = {"facts": facts, "lines": found}
        (out / "plan_memory.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    table = _render(facts, found)
    (out / "plan_memory.md").write_text(table, encoding="utf-8")
    print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="a checkpoint folder")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer folder, for --shape")
    parser.add_argument("--data", type=Path, help="Alpaca rows, JSON")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--lines", nargs="*", help=f"of: {'; '.join(one.name for one in LINES)}")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--timeout", type=int, default=180, help="seconds per line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The model, and the rows as token ids."""
    job = {
        "kind": "prepare", "model": str(options.model) if options.model else None,
        "shape": options.shape, "data": str(options.data), "max_length": 2048, "work": str(out),
        "tokenizer": str(options.tokenizer) if options.tokenizer else None,
        "result": str(out / "prepared.json"),
    }  # fmt: skip
    failure = start_worker(job, out / "prepare.log", timeout=600)
    if failure:
        raise SystemExit(f"The model could not be prepared: {failure}")
    facts: dict[str, Any] = json.loads((out / "prepared.json").read_text(encoding="utf-8"))
    return {**facts, "date": time.strftime("%Y-%m-%d")}


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """One line, trained; memory in GiB beyond the loaded model."""
    logging.basicConfig(level=logging.INFO)
    import torch

    from qlora_kit import attach_lora, load_quantized, train_sft
    from qlora_kit.errors import QloraKitError

    line = Line(**job["line"])
    on_gpu = torch.cuda.is_available()
    if line.card_gib and on_gpu:
        whole = torch.cuda.get_device_properties(0).total_memory / _GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, line.card_gib / whole))
    ids = json.loads(Path(job["facts"]["data"]).read_text(encoding="utf-8"))["ids"]
    if line.filled:
        every = [token for one in ids for token in one]
        every *= math.ceil(job["steps"] * line.filled / len(every))
        ids = [every[n * line.filled : (n + 1) * line.filled] for n in range(job["steps"])]
    rows = [{"input_ids": one, "labels": one} for one in ids]
    settings = dict(line.settings)
    longest = line.length or line.filled or 2048
    loaded = load_quantized(job["facts"]["model"], max_seq_length=longest, engine="native")
    model = attach_lora(loaded, r=settings.pop("r", 16))
    warnings = _Warnings()
    logging.getLogger("qlora_kit").addHandler(warnings)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    found: dict[str, Any] = {"survived": True}
    try:
        result = train_sft(
            model, rows, plan=line.plan, packing=bool(line.length), max_length=longest,
            per_device_train_batch_size=line.batch, gradient_accumulation_steps=1,
            max_steps=job["steps"], save_strategy="no", report_to="none", disable_tqdm=True,
            output_dir=Path(job["work"]) / "run", **settings,
        )  # fmt: skip
    except QloraKitError as error:
        found = {"survived": False, "said": str(error)[:300]}
    else:
        manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
        found |= {"plan": result.plan, "memory": manifest["memory"]}
    if on_gpu:
        stats = torch.cuda.memory_stats()
        found |= {
            "model": before / _GIB,
            "allocated": (torch.cuda.max_memory_allocated() - before) / _GIB,
            "reserved": (torch.cuda.max_memory_reserved() - before) / _GIB,
            "retries": stats["num_alloc_retries"],
        }
    planned_anew = [one for one in warnings.texts if "computed anew" in one]
    return {**found, "warnings": warnings.texts, "planned_anew": len(planned_anew)}


class _Warnings(logging.Handler):
    """Collects what is warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _render_line(one: dict[str, Any]) -> str:
    if one["error"] or not one["survived"]:
        return f"| {one['line']} | no: {one['error'] or one['said'][:120]} | | | | | | | |"
    predicted = one["memory"]["predicted_gib"] or 0.0
    cells = [one["line"], "yes" if not one["planned_anew"] else "planned anew", f"{predicted:.2f}"]
    if "reserved" in one:
        ratio = one["reserved"] / predicted if predicted else 0.0
        cells += [f"{one['allocated']:.2f}", f"{one['reserved']:.2f}", f"{ratio:.3f}"]
        cells += ["yes" if 0.9 <= ratio <= 1.0 else "**no**", str(one["retries"])]
    else:
        cells += ["", "", "", "", ""]
    return f"| {' | '.join(cells)} | {one['plan']} |"


def _render(facts: dict[str, Any], found: list[dict[str, Any]]) -> str:
    head = (
        f"{facts['date']}, {facts['device']}, {facts['model_name']}, {facts['versions']}. "
        "GiB beyond the loaded model."
    )
    columns = (
        "line", "survived", "predicted", "allocated", "reserved", "reserved / predicted",
        "within", "allocator's retries", "plan",
    )  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([head, "", *rows, *map(_render_line, found)]) + "\n"


if __name__ == "__main__":
    main()
