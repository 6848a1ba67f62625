"""Exports in forks of a single-threaded process, killed half-way, and what they leave."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

MANIFEST = "qlora_kit_manifest.json"


def state_of(destination: Path, describe: Callable[[dict], str]) -> str:
    """``absent``, ``broken``, or for a whole export what ``describe`` makes of its facts."""
    if not destination.exists():
        return "absent"
    manifest = json.loads((destination / MANIFEST).read_text())
    wanted = {file["name"]: file["sha256"] for file in manifest["files"]}
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in destination.iterdir()
        if path.name != MANIFEST
    }
    return describe(manifest["facts"]) if wanted == found else "broken"


def run_forked(export: Callable[[], object], seconds: float | None) -> float:
    """Export in a fork, killed after so many seconds if any are given; how long it took."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            export()
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.perf_counter() - started
