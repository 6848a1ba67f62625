"""Pushes to a hub and dequantizings that are killed, and what the next one leaves of them.

    python leftovers.py FOLDER ROUNDS

Prints one JSON line: for each kind the kills, how many left something, and what is left in the end.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Before anything imports the hub's client, which then speaks the protocol of hub_endpoint.py.
os.environ.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")

import forking
from hub_endpoint import GOOD_TOKEN, HubEndpoint


def serve() -> str:
    """A hub in a process of its own; its address."""
    read, write = os.pipe()
    if os.fork() == 0:
        parent = os.getppid()
        with HubEndpoint() as hub:
            os.write(write, hub.url.encode())
            while os.getppid() == parent:
                time.sleep(0.2)
        os._exit(0)
    os.close(write)
    return os.read(read, 200).decode()


def kill_often(work, place: Path, finished, rounds: int) -> dict:
    """Do ``work`` in forks that are killed, then in one to its end."""
    rng = random.Random(0)
    work()
    took = min(forking.run_forked(lambda: (finished(), work()), None) for _ in range(2))
    left = 0
    for _ in range(rounds):
        finished()
        forking.run_forked(work, rng.uniform(0, took))
        left += any(path.name.startswith(".") for path in place.iterdir())
    finished()
    forking.run_forked(work, None)
    rest = sorted(path.name for path in place.iterdir() if path.name.startswith("."))
    return {"kills": rounds, "left_something": left, "left_in_the_end": rest}


def main(folder: Path, rounds: int) -> None:
    address = serve()
    import torch

    from checkpoints import make_checkpoint, randomize
    from qlora_kit import attach_lora, export_model, load_quantized
    from qlora_kit.engines.gguf.cached_checkpoint import dequantize_gguf

    torch.set_num_threads(1)
    temporary, cache = folder / "tmp", folder / "cache"
    temporary.mkdir(parents=True)
    tempfile.tempdir = str(temporary)
    base = make_checkpoint(folder / "base", "llama", hidden_size=256)
    model = load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    model = randomize(attach_lora(model, r=4))
    export_model(model, "gguf", folder / "gguf", quantization="f16", verify=False)
    (file,) = (folder / "gguf").glob("*.gguf")

    def push():
        export_model(
            model, "hub", repo_id="me/model", token=GOOD_TOKEN, endpoint=address, verify=False
        )

    def forget():
        for path in cache.glob("[!.]*"):
            shutil.rmtree(path)

    print(
        json.dumps(
            {
                "hub": kill_often(push, temporary, lambda: None, rounds),
                "gguf": kill_often(lambda: dequantize_gguf(file, cache), cache, forget, rounds),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
