"""No socket is opened by what may not use the network, with nothing in the environment to help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent / "helpers"


@pytest.mark.parametrize("which", ["some", pytest.param("whole", marks=pytest.mark.slow)])
def test_offline_flows_ask_nobody(which, tmp_path):
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "TRANSFORMERS"))}
    done = subprocess.run(
        [sys.executable, str(HELPERS / "offline_flows.py"), str(tmp_path), which],
        capture_output=True, text=True, check=False,
        # huggingface_hub's own home, so that nothing of this machine's is found.
        env={**environment, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == {}
    assert report["asked"] == []
    assert report["is_seen"]
