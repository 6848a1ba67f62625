"""Every offline flow with a base that is known by its hub name, and what went to the network.

Run by test_offline.py in a process that may use the hub. Prints one JSON line: the flows that
failed, and each host or address that was asked for, with the flow that asked.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import make_checkpoint

ASKED: list[tuple[str, str]] = []
FAILED: dict[str, str] = {}
NOW = ["import"]


def refuse(*arguments: Any, **named: Any) -> None:
    """Stand in for whatever leaves the process."""
    ASKED.append((NOW[0], repr(arguments[:2])))
    raise OSError("the network is refused in this test")


def flow(name: str, run: Callable[[], Any]) -> Any:
    NOW[0] = name
    try:
        return run()
    except Exception as error:
        FAILED[name] = f"{type(error).__name__}: {error}"
        return None


def main(folder: Path, is_whole: bool) -> None:
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, refuse)
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    from qlora_kit import attach_lora, export_model, generate_stream, load_quantized, train_sft
    from qlora_kit.errors import OfflineError, QloraKitError

    hub = folder / "hub"
    repository = hub / "models--some--base"
    shutil.copytree(make_checkpoint(folder / "base", "llama"), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(8)]
    settings: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 1, "output_dir": folder / "run",
        "disable_tqdm": True, "plan": {"compile": False}, "max_length": 64,
    }  # fmt: skip

    def load(name: Any) -> Any:
        return load_quantized(name, 64, "float32", cache_dir=hub)

    fresh = flow("load", lambda: attach_lora(load("some/base"), r=2))
    flow("lora", lambda: export_model(fresh, "lora", folder / "lora"))
    # What peft looks up for: a base that is known by its name only.
    stated = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == "some/base"
    model = flow("load adapter", lambda: load(folder / "lora"))
    flow("train", lambda: train_sft(model, rows, max_steps=2, **settings))
    again = flow("load again", lambda: load(folder / "lora"))
    flow("resume", lambda: train_sft(
        again, rows, max_steps=3, resume_from_checkpoint=True, **settings))  # fmt: skip
    flow("load checkpoint", lambda: load(folder / "run" / "checkpoint-2"))
    flow("generate", lambda: list(generate_stream(model, "Say", max_new_tokens=2)))
    several = ["lora", "merged_16bit"]
    if is_whole:
        several += ["merged_4bit", "gguf", "gguf-lora"]
        flow("full", lambda: export_model(model, "lora", folder / "full", verify="full"))
        plain = {**settings, "plan": False, "output_dir": folder / "plain"}
        flow("train plain", lambda: train_sft(model, rows, max_steps=1, **plain))
        for base in ("original", "dequantized"):
            flow(base, lambda b=base: export_model(model, "merged_16bit", folder / b, base=b))
    flow("several", lambda: export_model(model, several, folder / "s").raise_for_failures())
    offline = list(ASKED)
    # Whoever may ask is seen: else nothing above would prove anything.
    try:
        load_quantized("some/other", local_files_only=False)
    except OfflineError:
        raise
    except QloraKitError:
        is_seen = len(ASKED) > len(offline)
    print(json.dumps({"failed": FAILED, "asked": offline, "is_seen": is_seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "whole")
