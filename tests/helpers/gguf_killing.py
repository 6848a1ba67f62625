"""GGUF exports that are killed at random moments, in forks of a single-threaded process.

Run by test_gguf_robust.py. Prints one JSON line: what stood at the destination before and after
each kill, and what was left lying about.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import forking

# Kills that have to leave half a file behind.
_ENOUGH = 3


def state_of(destination: Path) -> str:
    """``absent``, the types of a whole export, or ``broken``."""
    return forking.state_of(destination, lambda facts: "+".join(facts["quantization"]))


def main(folder: Path, rounds: int) -> None:
    import torch

    import gguf_tiny as tiny
    from qlora_kit import export_model, load_quantized

    torch.set_num_threads(1)
    config = tiny.make_config("llama", num_hidden_layers=4)
    base = tiny.save_checkpoint(tiny.make_model(config), tiny.byte_level_tokenizer(), folder / "b")
    model = load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    destination = folder / "out" / "files"
    types = {"f16+q4_k_m": ["f16", "q4_k_m"], "q8_0": ["q8_0"]}

    def run_forked(name: str, seconds: float | None) -> float:
        return forking.run_forked(
            lambda: export_model(
                model, "gguf", destination,
                quantization=types[name], overwrite=True, verify=False,
            ),
            seconds,
        )  # fmt: skip

    # Here, so that the forks find everything imported and take the time of an export alone.
    export_model(model, "gguf", folder / "warm", quantization=["f16", "q4_k_m"], verify=False)
    took = {name: run_forked(name, None) for name in types}
    seen, leftovers = [], 0
    rng = random.Random(0)
    for number in range(4 * rounds):
        if number >= rounds and leftovers >= _ENOUGH:
            break
        if number % 3 == 0 and destination.exists():
            shutil.rmtree(destination)
        before = state_of(destination)
        tried = "q8_0" if before == "f16+q4_k_m" else "f16+q4_k_m"
        run_forked(tried, rng.uniform(0.3, 1.1) * took[tried])
        after = state_of(destination)
        if after == tried:  # finished before it was killed: the machine is faster than it was
            took[tried] *= 0.9
        seen.append([before, tried, after])
        leftovers += any(".files." in path.name for path in destination.parent.iterdir())
    run_forked("q8_0", None)
    rest = sorted(path.name for path in destination.parent.iterdir())
    print(json.dumps({"seen": seen, "leftovers": leftovers, "rest": rest,
                      "last": state_of(destination), "took": took}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
