"""The chunked loss against PyTorch's cross-entropy on full logits."""

import pytest
import torch

from qlora_kit.engines.native.layers.loss import (
    linear_cross_entropy,
    plain_softmax_step,
    softmax_step,
)


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 30, (11,), generator=generator)
    targets[3] = targets[10] = -100
    return hidden.requires_grad_(), weight, targets


@pytest.mark.parametrize("step", [softmax_step, plain_softmax_step])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_equals_cross_entropy(step, chunk, softcap):
    hidden, weight, targets = _inputs()
    loss, stats = linear_cross_entropy(hidden, weight, targets, chunk, step, softcap=softcap)
    (grad,) = torch.autograd.grad(loss / 9, hidden)
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (reference,) = torch.autograd.grad(expected / 9, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, reference)
    kept = targets != -100
    probabilities = logits[kept].softmax(-1)
    hits = (logits[kept].argmax(-1) == targets[kept]).sum()
    entropy = -(probabilities * probabilities.log()).sum()
    torch.testing.assert_close(stats, torch.stack([hits.double(), entropy.detach()]))


def test_low_precision_inputs_are_summed_in_float32():
    hidden, weight, targets = _inputs(torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, targets, 4)
    assert loss.dtype == torch.float32
    logits = (hidden @ weight.T).float()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, targets = _inputs()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets, 4)
    assert not loss.requires_grad
