"""Several ranks make the same optimizer step as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train_one_step

ALONE = {
    "alone": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
}
TOGETHER = {
    "padded": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padding-free": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                     "padding_free": True},
    "packed": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
               "packing": True},
}  # fmt: skip


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks_share_one_mean(tiny_llama: Path, tmp_path: Path) -> None:
    """Ranks with different numbers of trained tokens: a mean of their means would differ."""
    train_one_step.main(str(tiny_llama), str(tmp_path), ALONE)
    helpers = Path(train_one_step.__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(helpers), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        # On every machine alike: two processes on one GPU cannot talk through NCCL.
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(helpers / "train_one_step.py"), str(tiny_llama), str(tmp_path), json.dumps(TOGETHER),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def read(name: str) -> dict[str, Any]:
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    alone = read("alone-0")
    for name in TOGETHER:
        ranks = [read(f"{name}-{rank}") for rank in (0, 1)]
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
            assert rank["tokens"] == alone["tokens"], name
            for parameter, value in alone["weights"].items():
                torch.testing.assert_close(rank["weights"][parameter], value, rtol=0, atol=1e-6)
    # One run, one manifest: the ranks share a folder on most machines.
    manifests = [(tmp_path / f"run-{rank}" / "qlora_kit_manifest.json") for rank in (0, 1)]
    assert [manifest.is_file() for manifest in manifests] == [True, False]
