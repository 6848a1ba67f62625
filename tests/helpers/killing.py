"""Exports that are killed: a process that forks exporters and kills them at random moments.

Run by test_export.py in a process of its own, single-threaded, because forking is safe only
there. Prints one JSON line with what it saw.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import forking


def state_of(destination: Path) -> str:
    """``absent``, the dtype of a whole export, or ``broken``."""
    return forking.state_of(destination, lambda facts: facts["dtype"])


def kill_at_every_step(export, destination: Path, *, replace: bool) -> list[list[object]]:
    """Kill before the first, second, ... flush, rename or removal, until none is left.

    Args:
        export: Writes an export of the given dtype.
        destination: Where to.
        replace: Whether there is one already.

    Returns:
        For each: its name, the state before, what was being written, and the state after.
    """
    from qlora_kit.artifacts import staging

    places = [(os, "fsync"), (os, "rename"), (staging, "_exchange"), (shutil, "rmtree")]
    seen: list[list[object]] = []
    while len(seen) < 100:
        # Only what this run leaves, so that every run takes the same steps.
        for path in destination.parent.iterdir():
            if path.is_file():
                path.unlink()
            elif path != destination or not replace:
                shutil.rmtree(path)
        if replace and not destination.exists():
            export("float16")
        before = state_of(destination)
        dtype = "bfloat16" if before == "float16" else "float16"
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            calls = 0

            def wrap(name, real, write=write):
                def call(*args, **options):
                    nonlocal calls
                    calls += 1
                    if calls > len(seen):
                        os.write(write, name.encode())
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)

                return call

            for module, name in places:
                setattr(module, name, wrap(name, getattr(module, name)))
            try:
                export(dtype)
            finally:
                os._exit(0)
        os.close(write)
        name = os.read(read, 100).decode()
        os.close(read)
        os.waitpid(child, 0)
        if not name:
            break
        seen.append([name, before, dtype, state_of(destination)])
    return seen


def main(folder: Path, rounds: int) -> None:
    import torch

    from checkpoints import make_checkpoint, randomize
    from qlora_kit import attach_lora, export_model, load_quantized

    torch.set_num_threads(1)
    base = make_checkpoint(folder / "base", "llama", hidden_size=128)
    model = load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    model = randomize(attach_lora(model, r=4))
    destination = folder / "out" / "merged"

    def export(dtype: str) -> None:
        export_model(model, "merged_16bit", destination, dtype=dtype, overwrite=True, verify=False)

    def run_forked(dtype: str, seconds: float | None) -> float:
        return forking.run_forked(lambda: export(dtype), seconds)

    def measure() -> float:
        return max(run_forked("float16", None) for _ in range(3))

    took = measure()
    seen, leftovers, most_left = [], 0, 0
    rng = random.Random(0)
    for number in range(rounds):
        if number % 15 == 14:
            # The machine may be faster or slower by now.
            took = measure()
        # Every other round starts from an empty place.
        if number % 2 == 0 and destination.exists():
            shutil.rmtree(destination)
        before = state_of(destination)
        dtype = "bfloat16" if before == "float16" else "float16"
        run_forked(dtype, rng.uniform(0, took))
        after = state_of(destination)
        seen.append([before, dtype, after])
        left = [
            p
            for p in destination.parent.iterdir()
            if p.name.startswith(".merged.qlora_kit-") and p.is_dir()
        ]
        leftovers += bool(left)
        most_left = max(most_left, len(left))
    steps = [
        *kill_at_every_step(export, destination, replace=False),
        *kill_at_every_step(export, destination, replace=True),
    ]
    export("bfloat16")
    rest = sorted(path.name for path in destination.parent.iterdir())
    print(
        json.dumps(
            {
                "took": took,
                "seen": seen,
                "rounds_with_leftovers": leftovers,
                "most_leftovers": most_left,
                "steps": steps,
                "rest": rest,
                "last": state_of(destination),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
