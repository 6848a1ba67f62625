"""Examples laid end to end attend as they do alone."""

import pytest
import torch

from qlora_kit.engines.native.layers import capped_attention, segment_attention
from qlora_kit.engines.native.layers.attention import attend, choose_attention, make_block_mask

LENGTHS = (5, 1, 13, 8)
BOUNDS = torch.tensor([0, 5, 6, 19, 27, 27, 27], dtype=torch.int32)


def _inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((27, 4, 16), (27, 2, 16), (27, 2, 16))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _alone(q, k, v):
    outputs, start = [], 0
    for length in LENGTHS:
        part = slice(start, start + length)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                *(
                    (t[part].repeat_interleave(r, 1)).transpose(0, 1)[None]
                    for t, r in ((q, 1), (k, 2), (v, 2))
                ),
                is_causal=True,
            )[0].transpose(0, 1)
        )
        start += length
    return torch.cat(outputs)


@pytest.mark.parametrize("uses_mask", [False, True])
def test_every_example_attends_alone(uses_mask):
    q, k, v = _inputs(torch.float32)
    mask = make_block_mask(BOUNDS, 27) if uses_mask else None
    out = attend(q, k, v, BOUNDS, torch.tensor(13, dtype=torch.int32), mask)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * probe).sum(), (q, k, v))
    expected = _alone(q, k, v)
    references = torch.autograd.grad((expected * probe).sum(), (q, k, v))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


def _written_out(q, k, v, window, scale, softcap):
    """Scores of all pairs, in the order of transformers' eager attention."""
    k, v = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    away = torch.arange(27)[:, None] - torch.arange(27)[None]
    allowed = (owner[:, None] == owner[None]) & (away >= 0) & (away < (window or 27))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("uses_mask", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(0, 2.0), (4, 0.0), (4, 2.0), (1, 0.0)])
def test_windows_and_soft_caps(uses_mask, window, softcap, monkeypatch):
    """Also where an example takes several calls, each for a few queries."""
    for module, name in (
        (segment_attention, "CAPPED_QUERIES"), (segment_attention, "_LEAST_QUERIES"),
        (capped_attention, "CAPPED_QUERIES"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 3)
    q, k, v = _inputs(torch.float32)
    mask = make_block_mask(BOUNDS, 27, window) if uses_mask else None
    out = attend(
        q, k, v, BOUNDS, torch.tensor(13, dtype=torch.int32), mask,
        window=torch.tensor(window, dtype=torch.int32), scale=0.4, softcap=softcap,
    )  # fmt: skip
    expected = _written_out(q, k, v, window, 0.4, softcap)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads, references = (
        torch.autograd.grad((one * probe).sum(), (q, k, v)) for one in (out, expected)
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


def test_a_changed_example_leaves_its_neighbours_alone():
    q, k, v = (tensor.detach() for tensor in _inputs(torch.float32))
    longest = torch.tensor(13, dtype=torch.int32)
    before = attend(q, k, v, BOUNDS, longest, None)
    k[6:19] += 1.0
    after = attend(q, k, v, BOUNDS, longest, None)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[19:], after[19:])
    assert not torch.equal(before[6:19], after[6:19])


def test_mask_is_block_diagonal_and_causal():
    mask = make_block_mask(torch.tensor([0, 2, 3], dtype=torch.int32), 3)[0, 0]
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_cpu_uses_a_kernel_that_knows_examples_apart():
    assert choose_attention(torch.device("cpu"), torch.float32, 64) == "varlen"
    assert choose_attention(torch.device("meta"), torch.float32, 64) == "mask"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_kernel_equals_the_mask():
    q, k, v = (tensor.detach().cuda() for tensor in _inputs(torch.bfloat16))
    bounds = BOUNDS.cuda()
    longest = torch.tensor(128, dtype=torch.int32)
    out = attend(q, k, v, bounds, longest, None)
    expected = attend(q, k, v, bounds, longest, make_block_mask(bounds, 27))
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
