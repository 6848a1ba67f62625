"""Files written by the exporter, read back as a base: right, or refused."""

from __future__ import annotations

import json

import pytest

import gguf_tiny as tiny
import qlora_kit
from forward import logits_of
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.engines.gguf.cached_checkpoint import dequantize_gguf
from qlora_kit.engines.gguf.file_tokenizer import build_tokenizer
from qlora_kit.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.tokenizer.probe_texts import list_probe_texts, mix_with_tokens
from qlora_kit.weights.source import SafetensorsSource

torch = pytest.importorskip("torch")

#: Cases that transformers reads as they were; every other one must be refused.
READ_CORRECTLY = {"llama", "llama-tied", "mistral", "qwen2", "qwen3", "qwen3-tied", "phi3"}


def export(folder, model, tokenizer, quantization, **options):
    tiny.save_checkpoint(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        done = convert(source, config, tokenizer, folder, quantization=quantization, **options)
    return done.files[quantization]


@pytest.mark.parametrize("case", [*sorted(tiny.CASES), "phi3-long"])
def test_a_family_is_read_back_as_it_was_or_refused(case, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.CASES, "phi3-long", ("Phi3Config", tiny.longrope_case(64)))
    tokenizer = tiny.byte_level_tokenizer()
    # bfloat16 values, since that is what the dequantized checkpoint holds.
    model = tiny.make_model(tiny.make_config(case)).to(torch.bfloat16).float()
    path = export(tmp_path, model, tokenizer, "f32")
    if case not in READ_CORRECTLY:
        with pytest.raises(UnsupportedModelError, match="safetensors checkpoint"):
            dequantize_gguf(path, tmp_path / "cache")
        return
    loaded = qlora_kit.load_quantized(
        path, 512, "float32", False, engine="native", cache_dir=tmp_path / "cache"
    )
    ids = tokenizer("The quick brown fox jumps over the lazy dog, 1234 times.")["input_ids"]
    right, got = (logits_of(m, [ids])[0].numpy() for m in (model, loaded.model))
    assert kl_divergence(right, got).mean() < 1e-5


@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
def test_a_quantized_file_is_read_as_llama_cpp_reads_it(quantization, tmp_path):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config("qwen3"))
    path = export(tmp_path, model, tokenizer, quantization)
    loaded = qlora_kit.load_quantized(
        path, 512, "float32", False, engine="native", cache_dir=tmp_path / "cache"
    )
    ids = tokenizer("The quick brown fox jumps over the lazy dog, 1234 times.")["input_ids"]
    got = logits_of(loaded.model, [ids])[0].numpy()
    with Llama(path) as llama:
        # The cache rounds to bfloat16, and llama.cpp the activations to 8 bits.
        assert kl_divergence(llama.logits(ids), got).mean() < 2e-3


@pytest.mark.parametrize(
    "kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "sp-llama", "sp-gemma"]
)
def test_the_tokenizer_comes_back(kind, tmp_path):
    from gguf import GGUFReader

    is_sentencepiece = kind.startswith("sp-")
    tokenizer = (
        tiny.sentencepiece_tokenizer(kind.removeprefix("sp-"))
        if is_sentencepiece
        else tiny.byte_level_tokenizer(kind)
    )
    config = tiny.make_config("llama", "unaligned", vocabulary=len(tokenizer) + 5)
    path = export(tmp_path, tiny.make_model(config), tokenizer, "q8_0", stop_token_ids=(2, 0))
    rebuilt = build_tokenizer(GGUFReader(path), path)
    texts = list_probe_texts() + mix_with_tokens([tokenizer.bos_token, tokenizer.eos_token])
    for text in texts:
        assert rebuilt(text)["input_ids"] == tokenizer(text)["input_ids"], repr(text)
    pairs = [tok("one", "two")["input_ids"] for tok in (tokenizer, rebuilt)]
    assert is_sentencepiece or pairs[0] == pairs[1]
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(rebuilt, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    assert rebuilt.chat_template == tokenizer.chat_template
    ids = tokenizer("Hello world, 12")["input_ids"]
    if not is_sentencepiece:
        assert rebuilt.decode(ids) == tokenizer.decode(ids)


def test_every_stop_token_comes_back(tmp_path):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config("llama"))
    path = export(tmp_path, model, tokenizer, "q8_0", stop_token_ids=(2, 0))
    loaded = qlora_kit.load_quantized(path, load_in_4bit=False, cache_dir=tmp_path / "cache")
    assert loaded.base.stop_token_ids == (2, 0)
    assert loaded.base.source == "gguf"


def test_a_model_trained_again_under_the_same_name_is_read_anew(tmp_path):
    """Files of one size that differ in a single layer, far from their beginning and end."""
    from gguf import GGUFReader

    tokenizer = tiny.byte_level_tokenizer()
    config = tiny.make_config("llama", intermediate_size=4096)
    path = export(tmp_path, tiny.make_model(config).to(torch.bfloat16), tokenizer, "f32")
    first = dequantize_gguf(path, tmp_path / "cache")
    assert dequantize_gguf(path, tmp_path / "cache") == first
    reader = GGUFReader(path, "r+")
    middle = path.stat().st_size // 2
    tensor = max(
        (tensor for tensor in reader.tensors if tensor.data_offset < middle),
        key=lambda tensor: tensor.data_offset,
    )
    assert 5 * 2**20 < tensor.data_offset < path.stat().st_size - tensor.n_bytes - 5 * 2**20
    tensor.data[:] *= 2
    reader.data.flush()
    assert dequantize_gguf(path, tmp_path / "cache") != first


def test_a_dead_process_leaves_nothing_and_a_cache_that_takes_nothing_is_named(tmp_path):
    cache = tmp_path / "cache"
    left = cache / ".other-model.qlora_kit-0a1b2c3d.partial" / "checkpoint"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of one")
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config("llama")).to(torch.bfloat16)
    path = tmp_path / f"{'n' * 250}.gguf"
    export(tmp_path, model, tokenizer, "f32").rename(path)
    folder = dequantize_gguf(path, cache)
    assert list(cache.iterdir()) == [folder]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"dequantized into the cache.*QLORA_KIT_CACHE"):
        dequantize_gguf(path, tmp_path / "file" / "cache")


# -- files that are not the whole model ------------------------------------------------------------


def rewrite(source, target, *, leave_out=(), rename=None, drop_keys=(), most=0):
    """A copy of a file with tensors or keys changed, in several parts if ``most`` tensors fit."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture, split_max_tensors=most)
    for field in reader.fields.values():
        if field.name in ("general.architecture", *drop_keys) or field.name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name not in leave_out:
            name = (rename or {}).get(tensor.name, tensor.name)
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = tiny.make_model(tiny.make_config("llama"))
    return export(tmp_path_factory.mktemp("whole"), model, tiny.byte_level_tokenizer(), "f32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"leave_out": ["blk.1.ffn_up.weight"]}, r"lacks 1 of \d+ .*ffn_up.weight; they would"),
        ({"rename": {"blk.0.attn_q.weight": "blk.0.attn_query.weight"}}, "lacks 1 .*attn_q.weight"),
        ({"rename": {"output.weight": "blk.7.ffn_up.weight"}}, "holds 1 .*blk.7.ffn_up.weight"),
        ({"drop_keys": ["llama.block_count"]}, "llama.block_count is missing"),
        ({"drop_keys": ["llama.embedding_length", "llama.attention.head_count"]},
         "llama.embedding_length, llama.attention.head_count are missing"),
    ],
)  # fmt: skip
def test_a_file_without_its_whole_model_is_refused(whole, tmp_path, change, said):
    path = rewrite(whole, tmp_path / "part.gguf", **change)
    with pytest.raises(UnsupportedModelError, match=said):
        dequantize_gguf(path, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_model_in_parts_is_read_whole_from_any_of_them(whole, tmp_path):
    rewrite(whole, tmp_path / "it.gguf", most=8)
    parts = sorted(tmp_path.glob("it-*.gguf"))
    assert len(parts) > 2
    expected = dequantize_gguf(whole, tmp_path / "cache")
    for part in (parts[0], parts[-1]):
        folder = dequantize_gguf(part, tmp_path / "cache")
        with SafetensorsSource(expected) as right, SafetensorsSource(folder) as got:
            assert list(right.names()) == list(got.names())
            assert all(torch.equal(right.load(name), got.load(name)) for name in right.names())
    assert not list((tmp_path / "cache").glob("*.gguf"))
    parts[1].unlink()
    with pytest.raises(ModelNotFoundError, match=rf"{parts[1].name} is not beside it"):
        dequantize_gguf(parts[0], tmp_path / "other")
    lonely = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(UnsupportedModelError, match="not called like one"):
        dequantize_gguf(lonely, tmp_path / "other")


def test_parts_of_different_models_are_refused(whole, tmp_path):
    rewrite(whole, tmp_path / "it.gguf", most=8)
    parts = sorted(tmp_path.glob("it-*.gguf"))
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(UnsupportedModelError, match="says that it is part 1"):
        dequantize_gguf(parts[0], tmp_path / "cache")
