"""The Triton kernels, run by Triton's interpreter on the CPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from qlora_kit.engines.native.fast.swiglu import swiglu

generator = torch.Generator().manual_seed(0)
gate_up = torch.randn((7, 2000), generator=generator).requires_grad_()
probe = torch.randn((7, 1000), generator=generator)
out = swiglu(gate_up)
gate, up = gate_up.split(1000, dim=1)
expected = torch.nn.functional.silu(gate) * up
torch.testing.assert_close(out, expected)
found, reference = (
    torch.autograd.grad((value * probe).sum(), gate_up)[0] for value in (out, expected)
)
torch.testing.assert_close(found, reference)
torch.library.opcheck(
    torch.ops.qlora_kit.swiglu.default,
    (gate_up,),
    test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
)
"""


def test_kernels_equal_the_plain_expression():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (torch brings it on Linux with CUDA)")
    subprocess.run(
        [sys.executable, "-c", _SCRIPT], check=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
