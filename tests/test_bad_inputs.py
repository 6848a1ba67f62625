"""Bad inputs of every boundary: refused by name, within seconds, and nothing raw."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.training.arguments import UnsavedToken

HELPERS = Path(__file__).parent / "helpers"


def _attack(*arguments):
    """Every case tried in forks of one process that has no threads yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, HELPERS / "bad_inputs.py", "--json", *arguments],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _find_unnamed(found):
    return [case for case in found if case[3] in ("raw", "hung", "died", "fat")]


def test_a_sample_of_bad_inputs_is_refused_by_name():
    found = _attack()
    assert _find_unnamed(found) == []
    assert sum(case[3] == "named" for case in found) > 30


@pytest.mark.slow
def test_every_bad_input_is_refused_by_name():
    assert _find_unnamed(_attack("--all")) == []


def test_a_checkpoint_s_arguments_hold_no_token(tmp_path):
    import torch
    from trl import SFTConfig

    arguments = SFTConfig(str(tmp_path), use_cpu=True, hub_token=UnsavedToken("hf_secret"))
    assert arguments.hub_token == "hf_secret"
    torch.save(arguments, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
