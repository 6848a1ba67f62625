"""Adapted tiny models for export tests."""

import pytest

from qlora_kit import attach_lora, load_quantized


def randomize(model, *, std=0.05, seed=1):
    """Give every trainable parameter values that matter; peft starts B at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_adapted(tiny_llama, tiny_qwen3):
    """Load a tiny base and attach a random adapter."""

    def make(kind="llama", *, dtype="float32", load_in_4bit=True, std=0.05, **options):
        folder = {"llama": tiny_llama, "qwen3": tiny_qwen3}.get(kind, kind)
        base = load_quantized(folder, 64, dtype, load_in_4bit, engine="native")
        return randomize(attach_lora(base, r=4, **options), std=std)

    return make


@pytest.fixture(scope="session")
def adapted(make_adapted):
    """A 4-bit llama with an adapter; exports only read it."""
    return make_adapted()


@pytest.fixture(scope="session")
def adapted16(make_adapted):
    """The same base unquantized."""
    return make_adapted(load_in_4bit=False)
