"""Small quantized models with adapters that already say something."""

import random

import pytest


@pytest.fixture
def make_adapted(tiny_llama, tiny_qwen3):
    """Load a tiny model and attach an adapter whose B matrices are not zero."""

    def make(kind="llama", *, dtype="float32", load_in_4bit=True, load_in_8bit=False, **adapter):
        import torch

        from qlora_kit import attach_lora, load_quantized

        folder = tiny_llama if kind == "llama" else tiny_qwen3
        loaded = load_quantized(folder, 256, dtype, load_in_4bit, load_in_8bit, engine="native")
        settings = {"r": 4, "lora_alpha": 6, "use_gradient_checkpointing": False, **adapter}
        adapted = attach_lora(loaded, **settings)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.data.copy_(values)
        return adapted

    return make


@pytest.fixture(scope="session")
def token_rows():
    """Rows of 4 to 40 random tokens, the first three of each without loss."""
    source = random.Random(0)
    rows = []
    for _ in range(48):
        ids = [source.randint(5, 300) for _ in range(source.randint(4, 40))]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows
