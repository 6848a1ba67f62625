"""Trainings that are killed, signalled and run twice: forks of one single-threaded process.

    python training_attacks.py BASE FOLDER KILLS SIGNALS

Prints one JSON line with what became of each.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

STEPS = 8
ROWS = [
    {"instruction": f"Say the number {n}.", "input": "", "output": f"The number is {n}."}
    for n in range(12)
]
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def train(base: Path, folder: Path, *, pause: float = 0.0, **settings) -> dict:
    """One training, described by what must be the same however often it was stopped."""
    from transformers import TrainerCallback

    from qlora_kit import attach_lora, load_quantized, train_sft

    class Paces(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            # Where it is, for whoever waits to send a signal.
            (folder.parent / f"{folder.name}.step").write_text(str(state.global_step))
            time.sleep(pause)

    model = attach_lora(load_quantized(base, 64, "float32", False, engine="native"), r=4)
    chosen = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, **settings}
    result = train_sft(
        model, ROWS, output_dir=folder, learning_rate=1e-2, warmup_steps=2,
        disable_tqdm=True, plan={"compile": False}, callbacks=[Paces()], **chosen,
    )  # fmt: skip
    digest = hashlib.sha256()
    for name, parameter in sorted(model.model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "losses": list(result.losses),
        "steps": result.steps,
        "was_interrupted": result.was_interrupted,
        "run": result.run_id,
    }


def start(work) -> tuple[int, int]:
    """Do something in a fork; its process, and where its answer can be read."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.close(read)
    status = 1
    try:
        try:
            answer = {"did": work()}
        except BaseException as error:
            is_ours = type(error).__module__.startswith("qlora_kit")
            answer = {"error": type(error).__name__, "said": str(error), "is_named": is_ours}
            if not is_ours:
                traceback.print_exc()
        os.write(write, json.dumps(answer).encode())
        status = 0
    finally:
        os._exit(status)
    raise AssertionError


def finish(started: tuple[int, int]) -> dict:
    """What a fork answered; how it ended where it did not."""
    child, read = started
    parts = []
    while part := os.read(read, 65536):
        parts.append(part)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if not parts:
        return {"ended": os.waitstatus_to_exitcode(status)}
    return json.loads(b"".join(parts))


def wait_for_step(folder: Path, step: int) -> None:
    marker = folder.parent / f"{folder.name}.step"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if int(marker.read_text()) >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"{folder} did not reach step {step}")


def kill_and_resume(base: Path, folder: Path, step: int, seconds: float) -> dict:
    """Kill so many seconds after a step; even ones are saved then."""
    started = start(lambda: train(base, folder, pause=0.03))
    wait_for_step(folder, step)
    time.sleep(seconds)
    os.kill(started[0], signal.SIGKILL)
    first = finish(started)
    whole = sorted(path.name for path in folder.glob("checkpoint-*")) if folder.is_dir() else []
    again = finish(start(lambda: train(base, folder, resume_from_checkpoint="auto")))
    if again.get("error") == "ConfigError" and "has done" in again["said"]:
        again = {"did": first.get("did") or "was over"}
    return {"step": step, "seconds": seconds, "checkpoints": whole, "again": again}


def signal_and_resume(base: Path, folder: Path, name: str, delays: list[float]) -> dict:
    """A run with the default of no checkpoint at all, signalled as often as there are delays."""
    never = {"save_strategy": "no"}
    started = start(lambda: train(base, folder, pause=0.02, **never))
    wait_for_step(folder, 2)
    for delay in delays:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(started[0], getattr(signal, name))
    first = finish(started)
    again = finish(start(lambda: train(base, folder, resume_from_checkpoint=True, **never)))
    return {"signal": name, "delays": delays, "first": first, "again": again}


def train_twice(base: Path, folder: Path) -> dict:
    """A second run beside one that lives, and one that goes on once the first was killed."""
    first = start(lambda: train(base, folder, pause=0.5))
    wait_for_step(folder, 3)
    second = finish(start(lambda: train(base, folder)))
    os.kill(first[0], signal.SIGKILL)
    finish(first)
    whole = sorted(path.name for path in folder.glob("checkpoint-*"))
    again = finish(start(lambda: train(base, folder, resume_from_checkpoint="auto")))
    return {"second": second, "checkpoints": whole, "again": again}


def main(base: Path, folder: Path, kills: int, signals: int) -> None:
    # Once, here: what forks import they import each anew. Nothing is computed, which would start
    # threads, whose locks a fork inherits.
    import peft
    import torch
    import torch._dynamo
    import transformers.models.llama.modeling_llama as llama
    from trl import SFTConfig, SFTTrainer

    from qlora_kit import attach_lora, load_quantized, train_sft

    _ = (peft, llama, SFTConfig, SFTTrainer, attach_lora, load_quantized, train_sft)
    torch.set_num_threads(1)
    rng = random.Random(0)
    found = {"reference": finish(start(lambda: train(base, folder / "reference")))}
    found["killed"] = [
        kill_and_resume(base, folder / f"killed-{n}", rng.randrange(1, STEPS), rng.uniform(0, 0.1))
        for n in range(kills)
    ]
    # SIGTERM first: the one that a scheduler sends.
    found["signalled"] = [
        signal_and_resume(base, folder / f"signalled-{n}", SIGNALS[(n + 1) % 4], [0.0])
        for n in range(signals)
    ]
    found["signalled_again"] = [
        signal_and_resume(
            base, folder / f"again-{n}", SIGNALS[n % 2], [0.0, rng.uniform(0, 0.05), 0.002]
        )
        for n in range(signals // 2)
    ]
    found["twice"] = train_twice(base, folder / "twice")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
