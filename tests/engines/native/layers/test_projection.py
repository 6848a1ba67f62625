"""The fused projection against float64 arithmetic on the same dequantized weights."""

import pytest
import torch

from qlora_kit.engines.native.layers import projection
from qlora_kit.engines.native.layers.projection import dequantize, fill_joined, join, project

ROWS, COLUMNS, RANK = [48, 16, 16], 64, 4
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def group():
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(0)
    packed, scales, dense = [], [], []
    for rows in ROWS:
        weight = torch.randn(rows, COLUMNS, generator=generator)
        data, state = bnb.quantize_4bit(weight, quant_type="nf4")
        packed.append(data)
        scales.append(state.absmax)
        dense.append(bnb.dequantize_4bit(data, state))
    down = torch.randn(3 * RANK, COLUMNS, generator=generator) / 8
    up = torch.block_diag(*(torch.randn(rows, RANK, generator=generator) for rows in ROWS))
    x = torch.randn(10, COLUMNS, generator=generator)
    bias = torch.randn(sum(ROWS), generator=generator)
    return packed, scales, torch.cat(dense), down, up, x, bias


def _blocks(matrix):
    rows, ranks, parts = 0, 0, []
    for size in ROWS:
        parts.append(matrix[rows : rows + size, ranks : ranks + RANK])
        rows, ranks = rows + size, ranks + RANK
    return parts


@pytest.mark.parametrize("rounds", [False, True], ids=["added", "stacked"])
@pytest.mark.parametrize("kept", ["packed", "cached", "joined"])
def test_equals_float64_arithmetic(group, kept, rounds, monkeypatch):
    """In both orders of adding: the second is what 16 bits on a GPU take."""
    packed, scales, dense, down, up, x, bias = group
    weights, scales = (packed, scales) if kept == "packed" else ([dense], [])
    if kept == "joined":
        weights = [join(dense, len(down))]
        fill_joined([(weights[0], down, up)])
    monkeypatch.setattr(projection, "rounds_before_adding", lambda device, dtype: rounds)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
    out = project(leaves[0], weights, scales, ROWS, 64, "nf4", bias, *leaves[1:])
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * probe).sum().backward()

    wide = [tensor.double().requires_grad_() for tensor in (x, down, up)]
    expected = wide[0] @ dense.double().T + bias.double() + wide[0] @ wide[1].T @ wide[2].T
    (expected * probe.double()).sum().backward()

    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, reference in zip(leaves[:2], wide[:2], strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
    for part, reference in zip(_blocks(leaves[2].grad), _blocks(wide[2].grad), strict=True):
        torch.testing.assert_close(part.double(), reference, rtol=1e-4, atol=1e-4)


def test_passes_gradcheck_in_float64(group):
    _, _, dense, down, up, x, _ = group
    arguments = [tensor.double().requires_grad_() for tensor in (x[:3], down, up)]

    def run(x, down, up):
        return project(x, [dense.double()], [], ROWS, 0, "", None, down, up)

    assert torch.autograd.gradcheck(run, arguments)


def test_without_adapter_only_the_input_gets_a_gradient(group):
    packed, scales, dense, *_, x, _ = group
    leaf = x.clone().requires_grad_()
    out = project(leaf, packed, scales, ROWS, 64, "nf4", None, None, None)
    out.sum().backward()
    torch.testing.assert_close(out, x @ dense.T)
    torch.testing.assert_close(leaf.grad, dense.sum(0).expand_as(x))


def test_dequantizes_as_bitsandbytes_does(group):
    packed, scales, dense, *_ = group
    assert torch.equal(dequantize(packed, scales, ROWS, COLUMNS, 64, "nf4", torch.float32), dense)


def test_operators_are_registered_correctly(group):
    packed, scales, _, down, up, x, bias = group
    arguments = (x.requires_grad_(), packed, scales, ROWS, 64, "nf4", bias, down, up)
    torch.library.opcheck(
        torch.ops.qlora_kit.lora_linear.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("rows", [16, 256], ids=["narrow", "wide"])
def test_a_small_adapter_survives_bfloat16(device, rows):
    """Added to a product that is rounded already, most of an update below half a step is lost."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    x, dense, down = draw(512, COLUMNS), draw(rows, COLUMNS), draw(RANK, COLUMNS)
    up, grad = 2e-4 * draw(rows, RANK), draw(512, rows)
    leaf = x.clone().requires_grad_()

    def share_kept(out, large, update):
        large, update = large.double(), update.double()
        return float(((out.double() - large) * update).sum() / (update * update).sum())

    exact = x.double() @ dense.double().T
    update = (x.double() @ down.double().T) @ up.double().T
    exact_back = grad.double() @ dense.double()
    update_back = (grad.double() @ up.double()) @ down.double()
    joined = join(dense, RANK)
    fill_joined([(joined, down, up)])
    for weight in (dense, joined):
        out = project(leaf, [weight], [], [rows], 0, "", None, down, up)
        (back,) = torch.autograd.grad(out, leaf, grad)
        assert 0.9 < share_kept(out, exact, update) < 1.1
        assert 0.9 < share_kept(back, exact_back, update_back) < 1.1
    # What peft's layers compute, and this project did at first.
    twice_rounded = torch.nn.functional.linear(x, dense) + (x @ down.T) @ up.T
    assert share_kept(twice_rounded, exact, update) < 0.5
