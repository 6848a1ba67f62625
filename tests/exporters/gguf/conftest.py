"""SmolLM2 as a checkpoint, dequantized once for all tests here."""

import pytest


@pytest.fixture(scope="session")
def smollm2_folder(smollm2, tmp_path_factory):
    from qlora_kit.engines.gguf.cached_checkpoint import dequantize_gguf

    return dequantize_gguf(smollm2, tmp_path_factory.mktemp("smollm2"))
