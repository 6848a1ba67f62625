"""The Triton kernels, run by Triton's interpreter on the CPU; test_cuda.py runs them on a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

_SWIGLU = """
import torch
from qlora_kit.engines.native.layers.swiglu import swiglu

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

_SOFTMAX = """
import torch
from qlora_kit.engines.native.layers.loss import plain_softmax_step
from qlora_kit.engines.native.layers.softmax import fused_softmax_step

generator = torch.Generator().manual_seed(0)
for columns in (30, 4096, 9001):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        logits = (4 * torch.randn((11, columns), generator=generator)).to(dtype)
        targets = torch.randint(0, columns, (11,), generator=generator)
        targets[3] = targets[10] = -100
        targets[0], targets[1] = logits[0].argmax(), columns - 1
        for softcap in (0.0, 6.0):
            expected, sums = plain_softmax_step(logits.clone(), targets, softcap)
            given = logits.clone()
            gradient, found = fused_softmax_step(given, targets, softcap)
            assert gradient is given
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=1e-4)
            torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-4)
"""

_CAPPED = """
import torch
from qlora_kit.engines.native.layers.capped_kernels import capped_segments, try_kernels

for width in (16, 24):
    assert try_kernels(torch.device("cpu"), torch.float32, 4, 2, width) is None
# Without a window, and with an example that is longer than a tile; fillers of no length.
from qlora_kit.engines.native.layers.segment_attention import attend_segments
bounds = torch.tensor([0, 5, 75, 75, 75], dtype=torch.int32)
q, k, v = (torch.randn((75, heads, 16)) for heads in (4, 2, 2))
expected, _ = attend_segments(q, k, v, bounds, bounds, None, 0.3, 2.0)
found, _ = capped_segments(q, k, v, bounds, 128, 0, 0.3, 2.0)
torch.testing.assert_close(found, expected)
"""


def test_kernels_equal_the_plain_expressions():
    if torch.cuda.is_available():
        # The torch of such machines may bring a Triton whose interpreter cannot run them: 3.6
        # takes no argument as a loop's end with a recent NumPy.
        pytest.skip("a GPU runs the kernels themselves, in test_cuda.py")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (torch brings it on Linux with CUDA)")
    subprocess.run(
        [sys.executable, "-c", _SWIGLU + _SOFTMAX + _CAPPED], check=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
