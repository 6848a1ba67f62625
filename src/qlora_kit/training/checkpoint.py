"""A checkpoint of a run: whose it is, and whether it is whole.

The trainer writes them; this module only looks. The last file of a checkpoint is its manifest,
with the run it belongs to and the hash of every other file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qlora_kit.artifacts.files import find_damaged_file
from qlora_kit.boundaries import describe_cause
from qlora_kit.manifest import read_manifest
from qlora_kit.training.identity import RunIdentity, read_identity

__all__ = [
    "CHECKPOINT_PREFIX",
    "EARLIER_PREFIX",
    "Checkpoint",
    "list_checkpoints",
    "list_set_apart",
]

CHECKPOINT_PREFIX = "checkpoint-"
#: Folders in an output folder with the checkpoints of earlier runs.
EARLIER_PREFIX: Final = "earlier-"

# The last file that the trainer itself writes.
_STATE: Final = "trainer_state.json"

#: A checkpoint that was saved without the optimizer's state lacks these.
_OPTIMIZER: Final = ("optimizer.pt", "scheduler.pt")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that a run saved its state in.

    Attributes:
        path: The folder.
    """

    path: Path

    @functools.cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What it says of itself; empty where it says nothing that can be read."""
        try:
            found: Any = read_manifest(self.path)
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def run(self) -> Mapping[str, Any]:
        """The run that saved it, or an empty mapping where it does not say."""
        found = self.manifest.get("run")
        return found if isinstance(found, dict) else {}

    @property
    def run_id(self) -> str | None:
        """The run's id."""
        found = self.run.get("id")
        return found if isinstance(found, str) else None

    @property
    def identity(self) -> RunIdentity | None:
        """What the run was made of."""
        return read_identity(self.run.get("identity"))

    @property
    def is_proven(self) -> bool:
        """Whether it says whose it is, and what its files should be."""
        return (
            self.run_id is not None
            and self.identity is not None
            and isinstance(self.manifest.get("files"), list)
            and bool(self.manifest["files"])
        )

    @property
    def has_been_written(self) -> bool:
        """Whether the trainer came to its own last file; looks at no content."""
        return self.run_id is not None or (self.path / _STATE).is_file()

    @functools.cached_property
    def damage(self) -> str | None:
        """What keeps anything from going on from it; every file is read to find out."""
        # Not Path.is_file, which raises over names that no file system can hold.
        if not os.path.isfile(self.path / _STATE):  # noqa: PTH113
            return f"it has no {_STATE}"
        files = self.manifest.get("files")
        if isinstance(files, list):
            found = find_damaged_file(self.path, files)
            if found is not None:
                return found
        try:
            self._read_step()
        except OSError as error:
            return f"{self.path / _STATE} cannot be read: {error}"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"{self.path / _STATE} is damaged: {error}"
        return None if self.is_proven else _find_unreadable(self.path)

    @functools.cached_property
    def step(self) -> int:
        """Optimizer steps done when it was saved; of an undamaged one."""
        return self._read_step()

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer's state and the schedule's were saved with it."""
        return all((self.path / name).is_file() for name in _OPTIMIZER)

    def _read_step(self) -> int:
        state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        return int(state["global_step"])


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a folder, whole or not, the one with most steps first."""
    paths = [
        path
        for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
    ]
    paths.sort(key=lambda path: int(path.name.removeprefix(CHECKPOINT_PREFIX)), reverse=True)
    return [Checkpoint(path) for path in paths]


def list_set_apart(folder: Path) -> list[Checkpoint]:
    """Checkpoints of earlier runs, which were moved away from an output folder's own."""
    apart = [path for path in folder.glob(f"{EARLIER_PREFIX}*") if path.is_dir()]
    apart.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [checkpoint for one in apart for checkpoint in list_checkpoints(one)]


def _find_unreadable(path: Path) -> str | None:
    """What a checkpoint without hashes can be found damaged by: files that cannot be opened."""
    import torch
    from safetensors import safe_open
    from transformers.trainer import safe_globals

    for name in sorted(file.name for file in path.iterdir() if file.is_file()):
        try:
            if name.endswith(".safetensors"):
                with safe_open(path / name, "pt") as opened:
                    opened.keys()
            elif name in (*_OPTIMIZER, "scaler.pt") or name.startswith("rng_state"):
                with safe_globals():
                    torch.load(path / name, map_location="cpu", weights_only=True)
            elif name in ("adapter_config.json", _STATE):
                dict(json.loads((path / name).read_text(encoding="utf-8")))
        except (OSError, MemoryError) as error:
            return f"{path / name} cannot be read: {describe_cause(error)}"
        # torch.load raises whatever the bytes make its parts raise.
        except Exception as error:  # noqa: BLE001
            return f"{path / name} is damaged: {error}"
    return None
