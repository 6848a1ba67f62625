"""GGUF export, measured: speed and memory per type, and what each type costs in quality.

    python benchmarks/gguf_tables.py --output results           # both tables
    python benchmarks/gguf_tables.py speed --output results     # 1.1 billion random parameters
    python benchmarks/gguf_tables.py quality --output results   # SmolLM2, or --model FOLDER_OR_GGUF

``speed`` writes a random Llama checkpoint of TinyLlama's shape in bfloat16 and converts it to one
type at a time, each in a fresh process. It reports wall-clock seconds, the peak of anonymous
memory (the memory map of the checkpoint does not count: the system drops it at will), megabytes
of float32 input per second and core, and how that compares with ggml's quantizer alone, called on
the same number of threads for matrices that are in memory as float32 already.

``quality`` converts a checkpoint to every type, without and with an importance matrix, and runs the
files in llama.cpp (xllamacpp): mean KL divergence from transformers in float32 and agreement of the
most likely token, on rows that the matrix has not seen. ``--sizes q4_k_m`` measures types chosen by
loss at no more bytes than that one's as well.

``gguf.md`` and ``gguf.json`` in the output folder hold the tables and what they were measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests" / "helpers"))

SPEED_TYPES = ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "q4_0"]
QUALITY_TYPES = ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m"]
QUALITY_TYPES += ["q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s"]
QUALITY_TYPES += ["iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_l", "q2_k_s", "iq2_m"]
QUALITY_TYPES += ["iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq1_0", "tq2_0"]
PACKAGES = ["gguf", "libggml-python", "xllamacpp", "torch", "transformers"]


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "processor": model,
        "cores": count_cores(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{machine['date']}; {versions}.",
    ]
    for part in ("speed", "quality"):
        if part in report:
            lines += ["", report[part]["subject"], "", *_render_table(report[part]["rows"])]
    return "\n".join(lines) + "\n"


def _render_table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ["" if row.get(name) is None else str(row[name]) for name in columns]
        table.append("| " + " | ".join(cells) + " |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["all", "speed", "quality"], default="all")
    parser.add_argument("--output", type=Path, help="folder for gguf.md and gguf.json")
    parser.add_argument("--types", nargs="*", help="types to measure")
    parser.add_argument("--layers", type=int, default=22, help="of the random model; 22 are 1.1B")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--scratch", type=Path, help="where the random model goes (7 GB)")
    parser.add_argument("--model", type=Path, help="checkpoint folder or .gguf, for quality")
    parser.add_argument(
        "--rows", type=Path, default=HERE.parent / "examples" / "field_guide.json",
        help="Alpaca rows, for quality: every other one for the matrix, the others measured on",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=1500, help="to measure on")
    parser.add_argument("--matrix-tokens", type=int, default=8000)
    parser.add_argument("--imatrix", type=Path, help="importance matrix instead, for quality")
    parser.add_argument(
        "--sizes", nargs="+", default=[], help="types beside which others are chosen by loss"
    )
    parser.add_argument(
        "--files", nargs="+", type=Path, default=[], help="files to measure too, for quality"
    )
    asked = parser.parse_args()
    report: dict[str, Any] = {"machine": describe_machine()}
    started = time.perf_counter()

    def save() -> None:
        report["seconds"] = round(time.perf_counter() - started)
        if asked.output:
            asked.output.mkdir(parents=True, exist_ok=True)
            (asked.output / "gguf.json").write_text(json.dumps(report, indent=1) + "\n")
            (asked.output / "gguf.md").write_text(render(report))

    if asked.part in ("all", "speed"):
        from gguf_speed import measure_speed

        report["speed"] = measure_speed(
            asked.layers, asked.threads, asked.types or SPEED_TYPES, asked.scratch
        )
        save()
    if asked.part in ("all", "quality"):
        from gguf_quality import Asked, measure_quality

        def keep(found: dict[str, Any]) -> None:
            report["quality"] = found
            save()

        types = QUALITY_TYPES if asked.types is None else asked.types
        measure_quality(
            Asked(
                asked.model, types, asked.rows, asked.tokens, asked.matrix_tokens, asked.imatrix,
                asked.sizes, asked.files,
            ),
            keep,
        )  # fmt: skip
    print(render(report))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
