"""All lines about several cards in one call, with the one-card line beside them.

    python benchmarks/ranks_table.py --cards 4 --tokenizer FOLDER --work /dev/shm/ranks --minutes 9
    python benchmarks/ranks_table.py ... --lines 70b-sharded,32b-sharded --results results.jsonl

Lines run one after the other, each in processes of its own; the models are made first, in
``--work``. A line that fails or for which no time is left is said to have, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

HERE: Final = Path(__file__).resolve().parent
PACKED: Final = ("--rows", "1", "--packed", "16384", "--draws", "4000")


class Line(NamedTuple):
    """A line of the table: what runs, on which shape, on how many cards (0: as many as given)."""

    shape: str
    cards: int
    script: str
    arguments: tuple[str, ...]


def _ours(plan: dict[str, Any] | None, *arguments: str) -> tuple[str, ...]:
    return (*arguments, *(() if plan is None else ("--plan", json.dumps(plan))))


_FULL: Final = {"checkpointing": "full", "weights": "nf4"}
LINES: Final = {
    "4b-rows-1": Line("qwen3-4b", 1, "ranks.py", _ours(None, "--rows", "8", "--steps", "30")),
    "4b-rows": Line("qwen3-4b", 0, "ranks.py", _ours(None, "--rows", "8", "--steps", "30")),
    "4b-packed-1": Line("qwen3-4b", 1, "ranks.py", _ours(_FULL, *PACKED, "--steps", "10")),
    "4b-packed": Line("qwen3-4b", 0, "ranks.py", _ours(_FULL, *PACKED, "--steps", "10")),
    # What sharding costs, where it is not needed.
    "4b-packed-sharded": Line(
        "qwen3-4b", 0, "ranks.py", _ours({**_FULL, "shard": True}, *PACKED, "--steps", "10")
    ),
    "32b-1": Line("qwen3-32b", 1, "ranks.py", _ours(_FULL, *PACKED, "--steps", "5")),
    "32b": Line("qwen3-32b", 0, "ranks.py", _ours(_FULL, *PACKED, "--steps", "6")),
    "32b-sharded": Line(
        "qwen3-32b", 0, "ranks.py", _ours({**_FULL, "shard": True}, *PACKED, "--steps", "6")
    ),
    "70b-sharded": Line(
        "llama-70b", 0, "ranks.py", _ours({**_FULL, "shard": True}, *PACKED, "--steps", "5")
    ),
    "trl-ddp": Line("qwen3-4b", 0, "ranks_peers.py", ("--engine", "trl-ddp")),
    "trl-fsdp2": Line("qwen3-4b", 0, "ranks_peers.py", ("--engine", "trl-fsdp2")),
    "unsloth": Line("qwen3-4b", 0, "ranks_peers.py", ("--engine", "unsloth")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="any tokenizer's folder")
    parser.add_argument("--work", type=Path, required=True, help="holds the models: 8 to 141 GB")
    parser.add_argument("--lines", default=",".join(LINES))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all lines together")
    parser.add_argument("--results", type=Path, help="a file that lines are added to")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    for name in options.lines.split(","):
        line = LINES[name]
        # Sharing a base takes somebody to share it with, and one card's line needs no twin.
        if options.cards == 1 and line.cards == 0 and "sharded" in name:
            continue
        found = _run(line, options, end)
        text = json.dumps({"line": name, "shape": line.shape, **found})
        print(text, flush=True)
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def _run(line: Line, options: argparse.Namespace, end: float) -> dict[str, Any]:
    model = options.work / line.shape
    seconds = {}
    if not (model / "model.safetensors.index.json").is_file():
        from random_model import make_random_model

        started = time.monotonic()
        make_random_model(line.shape, options.tokenizer, model)
        seconds["made_s"] = round(time.monotonic() - started, 1)
    left = end - time.monotonic()
    if left < 20:
        return {"failed": "no time was left", **seconds}
    count = line.cards or options.cards
    output = options.work / "output"
    command = [
        *_launch(line, count), str(HERE / line.script), str(model), *line.arguments,
        "--output", str(output),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than the {left:.0f} s that were left", **seconds}
    said = [text[6:] for text in done.stdout.splitlines() if text.startswith("RANKS ")]
    if not said:
        return {"failed": (done.stderr or done.stdout)[-1500:], **seconds}
    return {**json.loads(said[-1]), **seconds}


def _launch(line: Line, count: int) -> Sequence[str]:
    if "unsloth" in line.arguments and count > 1:
        return [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            f"--num_processes={count}", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no",
        ]  # fmt: skip
    if count == 1:
        return [sys.executable]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
