"""bitsandbytes' optimizers without a wait after every parameter: the same updates."""

import bitsandbytes
import pytest
import torch

from qlora_kit.engines.native.bitsandbytes_optimizers import without_waiting


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit"])
def test_queued_optimizers_step_as_bitsandbytes_own(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((64, 128), (32,), (16, 512))]
    results = []
    for optimizer_class in (getattr(bitsandbytes.optim, name),) * 2:
        if results:
            optimizer_class = without_waiting(optimizer_class)
        parameters = [torch.nn.Parameter(value.clone().to(device)) for value in start]
        optimizer = optimizer_class(parameters, lr=1e-2, weight_decay=0.01)
        noise = torch.Generator().manual_seed(1)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=noise).to(device)
            optimizer.step()
        results.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0].cpu(), start[0])


def test_only_bitsandbytes_optimizers_are_replaced():
    assert without_waiting(torch.optim.AdamW) is torch.optim.AdamW
    replaced = without_waiting(bitsandbytes.optim.AdamW8bit)
    assert issubclass(replaced, bitsandbytes.optim.AdamW8bit)
    # transformers decides by this whether embeddings keep 32-bit states.
    assert "bitsandbytes" in str(replaced)


def test_paged_states_still_wait(monkeypatch):
    waits = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits.append)
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = without_waiting(bitsandbytes.optim.PagedAdamW8bit)([parameter])
    parameter.grad = torch.ones(64, 64)
    optimizer.step()
    assert waits
    waits.clear()
    optimizer = without_waiting(bitsandbytes.optim.AdamW8bit)([parameter])
    optimizer.step()
    assert not waits
