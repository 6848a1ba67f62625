"""Models that are no Llama, at the command line's defaults: right, or refused by name."""

import pytest

from checkpoints import make_tokenizer, randomize
from exported import load_plain
from forward import logits_of
from qlora_kit import attach_lora, export_model, generate_stream, load_quantized

#: transformers' configuration of each, small; the attention of the last three is not torch's own.
SHAPES = {
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeoX": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    },
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 128},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
}  # fmt: skip


def make_model(folder, name):
    import torch
    import transformers

    make_tokenizer(folder)
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(vocab_size=384, **SHAPES[name], **tokens)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        model = getattr(transformers, kind)(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "load_in_4bit"),
    [
        ("GPT2", True),
        pytest.param("GPT2", False, marks=pytest.mark.slow),
        *[
            pytest.param(name, load_in_4bit, marks=pytest.mark.slow)
            for name in list(SHAPES)[1:]
            for load_in_4bit in (True, False)
        ],
    ],
)
def test_defaults_train_and_export_what_is_no_llama(tmp_path, caplog, name, load_in_4bit):
    import torch

    base = load_quantized(make_model(tmp_path / "base", name), 64, "float32", load_in_4bit)
    model = randomize(attach_lora(base, r=4))
    assert "target_modules='all-linear' is trained instead" in caplog.text
    assert list(generate_stream(model, "Say 5", max_new_tokens=2))
    export_model(model, "lora", tmp_path / "lora", verify="full")
    again = load_quantized(tmp_path / "lora", 64, "float32", load_in_4bit)
    assert torch.equal(logits_of(again.model), logits_of(model.model))
    for kind in ("merged_16bit", "merged_4bit"):
        export_model(model, kind, tmp_path / kind, base="dequantized", verify="full")
    written = logits_of(load_plain(tmp_path / "merged_16bit", dtype=torch.float32))
    torch.testing.assert_close(written, logits_of(model.model), atol=0.03, rtol=0.03)


def test_a_model_of_images_and_text_exports_its_adapter(tmp_path):
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens = {"image_token_index": 383, "boi_token_index": 382, "eoi_token_index": 381}
    make_tokenizer(tmp_path / "base")
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = load_quantized(tmp_path / "base", 64, "float32", False)
    model = randomize(attach_lora(base, r=4))
    export_model(model, "lora", tmp_path / "lora", verify="full")
    again = load_quantized(tmp_path / "lora", 64, "float32", False)
    assert torch.equal(logits_of(again.model), logits_of(model.model))
    assert list(generate_stream(again, "Say 5", max_new_tokens=2))
