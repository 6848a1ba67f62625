"""What merged weights are rounded to, and one merge for several formats and types."""

from __future__ import annotations

import json

import pytest

import gguf_tiny as tiny
import qlora_kit
from checkpoints import randomize
from forward import logits_of
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit import export_model
from qlora_kit.errors import ConfigError
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.conversion.origin import read_origin
from qlora_kit.weights.source import SafetensorsSource

torch = pytest.importorskip("torch")


def load(folder, dtype, *, case="llama", four_bit=False, **options):
    """An adapted model whose base is stored in ``dtype``."""
    model = tiny.make_model(tiny.make_config(case)).to(getattr(torch, dtype))
    tiny.save_checkpoint(model, tiny.byte_level_tokenizer(), folder)
    base = qlora_kit.load_quantized(folder, 128, "float32", four_bit, engine="native")
    return randomize(qlora_kit.attach_lora(base, r=4, **options))


@pytest.mark.parametrize(
    ("four_bit", "base"), [(True, "auto"), (True, "dequantized"), (False, "auto")]
)
def test_with_merged_16bit_the_model_is_merged_once(four_bit, base, merges, tmp_path):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    model = load(tmp_path / "base", "bfloat16", four_bit=four_bit)
    types = ["f32", "q8_0", "q4_k_m"]
    formats = {"gguf": {"quantization": types}, "merged_16bit": {}}
    results = export_model(model, formats, tmp_path / "out", base=base, verify=False)
    assert not results.failures
    assert set(merges.values()) == {1}
    assert results["gguf"].facts["dtype"] == results["merged_16bit"].facts["dtype"] == "bfloat16"
    # The same bytes as alone, and as a conversion of the merged checkpoint.
    alone = export_model(
        model, "gguf", tmp_path / "alone", quantization=types, base=base, verify=False
    )
    folder = results["merged_16bit"].path
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        again = convert(
            source, config, model.tokenizer, tmp_path, quantization=types, name="base",
            stop_token_ids=model.base.stop_token_ids, origin=read_origin(model),
        )  # fmt: skip
    for name in types:
        file = results["gguf"].facts["files"][name]
        written = (results["gguf"].path / file).read_bytes()
        assert (alone.path / file).read_bytes() == written
        assert again.files[name].read_bytes() == written


def test_several_types_share_the_merge(merges, tmp_path):
    model = load(tmp_path / "base", "bfloat16")
    export_model(model, "gguf", tmp_path / "out", quantization=["f16", "q6_k"], verify=False)
    assert set(merges.values()) == {1}


def test_the_merge_is_rounded_once_to_the_bases_own_dtype(tmp_path):
    model = load(tmp_path / "base", "bfloat16")
    ids = model.tokenizer("The quick brown fox jumps over the lazy dog, 1234 times.")["input_ids"]
    right = logits_of(model.model, [ids])[0].numpy()
    kl = {}
    for dtype in ("auto", "bfloat16", "float16", "float32"):
        artifact = export_model(
            model, "gguf", tmp_path / dtype, quantization="f32", dtype=dtype, verify="full"
        )
        with Llama(artifact.path / artifact.facts["files"]["f32"]) as llama:
            kl[dtype] = kl_divergence(right, llama.logits(ids)).mean()
        assert artifact.facts["dtype"] == ("bfloat16" if dtype == "auto" else dtype)
    assert kl["auto"] == kl["bfloat16"] > 5 * kl["float16"]
    assert kl["float32"] < 1e-6 < kl["auto"] < 1e-3
    with pytest.raises(ConfigError, match="dtype must be"):
        export_model(model, "gguf", tmp_path / "x", dtype="f16")


def test_a_base_stored_in_float32_is_not_rounded(merges, tmp_path):
    model = load(tmp_path / "base", "float32")
    results = export_model(model, ["merged_16bit", "gguf"], tmp_path / "out", verify=False)
    assert results["gguf"].facts["dtype"] == "float32"
    assert results["merged_16bit"].facts["dtype"] == "bfloat16"
    assert set(merges.values()) == {2}
    # One dtype for both shares the merge after all.
    merges.clear()
    formats = ["merged_16bit", "gguf", "gguf-lora"]
    results = export_model(model, formats, tmp_path / "b", dtype="float16", verify=False)
    assert not results.failures
    assert set(merges.values()) == {1}


@pytest.mark.parametrize("four_bit", [False, True])
def test_experts_and_a_shared_merge(four_bit, merges, tmp_path):
    """transformers keeps experts in one tensor, and checkpoints one tensor per expert."""
    model = load(
        tmp_path / "base",
        "bfloat16",
        case="qwen3-moe",
        four_bit=four_bit,
        target_modules="attention",
    )
    results = export_model(model, ["merged_16bit", "gguf"], tmp_path / "out")
    assert not results.failures
    artifact = export_model(
        model, "gguf", tmp_path / "full", quantization=["f32", "q4_k_m"], verify="full"
    )
    assert artifact.verification.passed
    ids = model.tokenizer("The quick brown fox jumps over the lazy dog, 1234 times.")["input_ids"]
    right = logits_of(model.model, [ids])[0].numpy()
    with Llama(artifact.path / artifact.facts["files"]["f32"]) as llama:
        assert kl_divergence(right, llama.logits(ids)).mean() < (0.1 if four_bit else 1e-4)
