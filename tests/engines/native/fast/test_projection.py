"""The fused projection against float64 arithmetic on the same dequantized weights."""

import pytest
import torch

from qlora_kit.engines.native.fast.projection import dequantize, project

ROWS, COLUMNS, RANK = [48, 16, 16], 64, 4


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


@pytest.mark.parametrize("cached", [False, True])
def test_equals_float64_arithmetic(group, cached):
    packed, scales, dense, down, up, x, bias = group
    weights = [dense] if cached else packed
    leaves = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
    out = project(leaves[0], weights, [] if cached else scales, ROWS, 64, "nf4", bias, *leaves[1:])
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


def test_a_small_adapter_survives_bfloat16():
    """Added to a product that is rounded already, most of an update below half a step is lost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, COLUMNS, generator=generator).bfloat16()
    dense = torch.randn(sum(ROWS), COLUMNS, generator=generator).bfloat16()
    down = torch.randn(RANK, COLUMNS, generator=generator).bfloat16()
    up = (2e-4 * torch.randn(sum(ROWS), RANK, generator=generator)).bfloat16()
    exact = x.double() @ dense.double().T
    update = (x.double() @ down.double().T) @ up.double().T

    def share_kept(out):
        return float(((out.double() - exact) * update).sum() / (update * update).sum())

    assert 0.9 < share_kept(project(x, [dense], [], ROWS, 0, "", None, down, up)) < 1.1
    # What peft's layers compute, and this project did at first.
    twice_rounded = torch.nn.functional.linear(x, dense) + (x @ down.T) @ up.T
    assert share_kept(twice_rounded) < 0.5
