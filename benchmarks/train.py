"""Training speed: this library, TRL + peft + bitsandbytes, and unsloth, on the same rows.

    python benchmarks/train.py --model FOLDER --data rows.json --out results
    python benchmarks/train.py --shape qwen3-4b --tokenizer FOLDER --data rows.json --out results

Every line of the table is a process of its own, so that none of them meets another's patches,
kernels or memory. A model given by ``--shape`` is made from its configuration with random
weights and quantized to NF4 once; speed does not depend on the values. Lines a machine cannot
run are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

from model_shapes import SHAPES  # noqa: E402
from train_rows import ROWS, Row, arithmetic_limit, select_rows  # noqa: E402


def main() -> None:
    options = _parse()
    if options.worker:
        from train_worker import work

        work(json.loads(Path(options.worker).read_text(encoding="utf-8")))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    facts = _prepare(options)
    results = []
    for row in select_rows(options.rows, facts["device_type"]):
        print(f"... {row.name}", flush=True)
        result = _run(row, facts, options)
        results.append(result)
        print("   ", result.get("error") or _short(result), flush=True)
        report = {"facts": facts, "rows": results}
        (options.out / "train.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    table = _render(facts, results)
    (options.out / "train.md").write_text(table, encoding="utf-8")
    print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="a checkpoint folder")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer folder, for --shape")
    parser.add_argument("--data", type=Path, help="Alpaca rows, JSON")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--work", type=Path, help="where the model goes; default: --out")
    parser.add_argument("--rows", nargs="*", help=f"of: {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--packed-steps", type=int, default=0, help="of lines with packed rows; default: --steps"
    )
    parser.add_argument("--warmup", type=int, default=6, help="steps not counted")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--timeout", type=int, default=300, help="seconds per line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Make the model and the token ids, in a process of their own."""
    work = (options.work or options.out).resolve()
    job = {
        "kind": "prepare",
        "model": str(options.model) if options.model else None,
        "shape": options.shape,
        "tokenizer": str(options.tokenizer) if options.tokenizer else None,
        "data": str(options.data),
        "max_length": options.max_length,
        "work": str(work),
        "result": str(work / "prepared.json"),
    }
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    failure = start_worker(job, work / "prepare.log", timeout=600)
    if failure:
        raise SystemExit(f"The model could not be prepared: {failure}")
    facts: dict[str, Any] = json.loads((work / "prepared.json").read_text(encoding="utf-8"))
    facts |= {
        "prepare_seconds": round(time.perf_counter() - started, 1),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "dtype": options.dtype,
        "steps": options.steps,
        "packed_steps": options.packed_steps or options.steps,
        "warmup": options.warmup,
    }
    print(f"prepared in {facts['prepare_seconds']} s: {facts['device']}", flush=True)
    return facts


def _run(row: Row, facts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    result_file = options.out / f"{row.name}.json"
    result_file.unlink(missing_ok=True)
    job = {
        "kind": "train",
        "row": row.name,
        "facts": facts,
        "steps": row.steps or (row.packed and options.packed_steps) or options.steps,
        "warmup": options.warmup,
        "result": str(result_file.resolve()),
        "work": str((options.work or options.out).resolve()),
    }
    failure = start_worker(job, options.out / f"{row.name}.log", timeout=options.timeout)
    if failure or not result_file.is_file():
        return {"row": row.name, "error": failure or "no result"}
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    return {"row": row.name, **result}


def start_worker(job: dict[str, Any], log: Path, timeout: int, script: Path = HERE) -> str | None:
    """Run a worker; the last line of its log when it fails."""
    job_file = log.with_suffix(".job.json")
    job_file.write_text(json.dumps(job), encoding="utf-8")
    with log.open("w", encoding="utf-8") as stream:
        try:
            code = subprocess.run(
                [sys.executable, str(script), "--worker", str(job_file)],
                stdout=stream, stderr=subprocess.STDOUT, timeout=timeout, check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout} s"
    if code == 0:
        return None
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line
    ]
    return f"exit status {code}: {lines[-1] if lines else 'no output'}"


def _short(result: dict[str, Any]) -> str:
    return (
        f"{result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['step_seconds'] * 1000:,.0f} ms/step, peak {result['peak_gib']:.1f} GiB, "
        f"first step {result['first_step_seconds']:.1f} s"
    )


def _render(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    limit = arithmetic_limit(facts)
    done = [result for result in results if "error" not in result]
    classic = next((r for r in done if r["row"].startswith("trl-classic")), None)
    lines = [
        f"{facts['date']}, {facts['device']}, {facts['model_name']}, "
        f"{facts['parameters'] / 1e9:.2f} B parameters, {facts['dtype']}, {facts['versions']}",
        "",
        "| line | tokens/s | median step's | of TRL's classic | of the limit | ms/step | "
        "processor s/step | peak GiB (allocated / reserved) | first step s | last loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['row']} | {result['error'][:160]} | | | | | | | | |")
            continue
        speed = result["tokens_per_second"]
        ratio = f"{speed / classic['tokens_per_second']:.2f} x" if classic else ""
        share = f"{speed / limit:.0%}" if limit else ""
        lines.append(
            f"| {result['row']} | {speed:,.0f} | "
            f"{result['median_tokens_per_second']:,.0f} | {ratio} | {share} | "
            f"{result['step_seconds'] * 1000:,.0f} | {result['processor_seconds']:.2f} | "
            f"{result['peak_gib']:.2f} / "
            f"{result['reserved_gib']:.2f} | {result['first_step_seconds']:.1f} | "
            f"{result['losses'][-1]:.4f} |"
        )
    if limit:
        lines += ["", f"Arithmetic limit: {limit:,.0f} tokens/s."]
    for peer in ("trl-classic", "unsloth-classic", "ours-classic"):
        lines += _compare_curves(done, peer)
    return "\n".join(lines) + "\n"


def _compare_curves(done: list[dict[str, Any]], peer: str) -> list[str]:
    """How far each run of the same steps is from a peer's run of the classic script."""
    reference = next((result for result in done if result["row"].startswith(peer)), None)
    if reference is None:
        return []
    same = {row.name for row in ROWS if (row.batch * row.accumulation, row.packed) == (8, 0)}
    lines = ["", f"Loss per step against {reference['row']}, over the steps both did:", ""]
    for result in done:
        if result is reference or result["row"] not in same:
            continue
        pairs = list(zip(result["losses"], reference["losses"], strict=False))
        gaps = [abs(ours - theirs) for ours, theirs in pairs]
        lines.append(
            f"- {result['row']}: {len(gaps)} steps, largest difference {max(gaps):.4f}, "
            f"mean {sum(gaps) / len(gaps):.4f}"
        )
    return lines


if __name__ == "__main__":
    main()
