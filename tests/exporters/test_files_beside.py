"""The files beside the weights: the base's own tokenizer fields, and what its card says."""

import json
import shutil

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from exported import edit_json
from qlora_kit import attach_lora, export_model, load_quantized
from qlora_kit.engines.tokenizer import load_tokenizer

CARD = """---
license: other
license_name: tiny-license
language:
- en
- zh
tags:
- tiny
base_model: someone/else
---
# The base
"""


def load(folder, **options):
    base = load_quantized(folder, 64, "float32", load_in_4bit=False, engine="native")
    return attach_lora(base, r=2, **options)


@pytest.fixture
def base(tiny_llama, tmp_path):
    """A base whose makers wrote fields that transformers 5 has no use for."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    edit_json(
        folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=False, clean_up_tokenization_spaces=False, maker="us",
        added_tokens_decoder={"0": {"content": "<|endoftext|>", "special": True}},
    )  # fmt: skip
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.mark.parametrize("format", ["merged_16bit", "lora"])
def test_an_unchanged_tokenizer_keeps_what_its_makers_wrote(base, tmp_path, format):
    folder = export_model(load(base), format, tmp_path / "out").path
    before, after = (
        json.loads((where / "tokenizer_config.json").read_text()) for where in (base, folder)
    )
    # The padding token is chosen on loading, if the base has none.
    assert after == {**before, "pad_token": "<|endoftext|>"}
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    card = (folder / "README.md").read_text(encoding="utf-8")
    stated = yaml.safe_load(card.split("---")[1])
    assert (stated["license"], stated["license_name"]) == ("other", "tiny-license")
    assert stated["language"] == ["en", "zh"]
    assert {"qlora-kit", "tiny"} <= set(stated["tags"])
    # A folder's name is no name on the hub, and the base's base is not this model's.
    assert "base_model" not in stated


def test_what_changed_is_written_and_only_that(base, tmp_path):
    model = load(base)
    model.tokenizer.chat_template = "{{ messages }}"
    model.tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    model.model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    folder = export_model(model, "merged_16bit", tmp_path / "out").path
    after = json.loads((folder / "tokenizer_config.json").read_text())
    assert (after["tokenizer_class"], after["maker"]) == ("PreTrainedTokenizerFast", "us")
    assert "<|mine|>" in [token["content"] for token in after["added_tokens_decoder"].values()]
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == "{{ messages }}"
    ids = model.tokenizer("a<|mine|>b")["input_ids"]
    assert again("a<|mine|>b")["input_ids"] == load_tokenizer(folder)("a<|mine|>b")["input_ids"]
    assert again("a<|mine|>b")["input_ids"] == ids
    assert len(model.tokenizer) - 1 in ids


def test_a_class_that_reads_the_file_otherwise_is_replaced_and_named(base, tmp_path, caplog):
    """By ``LlamaTokenizerFast`` transformers 5.17 replaces the file's pre-tokenizer."""
    edit_json(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    model = load(base)
    folder = export_model(model, "merged_16bit", tmp_path / "out").path
    stated = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert stated == "PreTrainedTokenizerFast"
    assert "where the base said LlamaTokenizerFast" in caplog.text
    text = "Hello world, it's 12345"
    assert AutoTokenizer.from_pretrained(folder)(text) == model.tokenizer(text)


def test_llama_cpp_s_converter_finds_the_class_it_asks_for(base, tmp_path):
    """As Phi-4, which it converts only where the class is GPT2Tokenizer.

    Its pre-tokenizer is not GPT-2's, but transformers 5.17 does not ask the class for phi3.
    """
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, pad_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip
    model.save_pretrained(base)
    content = json.loads((base / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {
        "type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]
    }  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(content))
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    adapted = load(base, target_modules=["o_proj"])
    folder = export_model(adapted, "merged_16bit", tmp_path / "out").path
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    assert stated["tokenizer_class"] == "GPT2Tokenizer"


def write_llama2_tokenizer(folder):
    """``▁`` before every piece of a text, those behind special tokens too."""
    words = ["▁Hello", "Hello", "▁x", "x", "▁", *"▁Helox "]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(["<unk>", *words]))}
    merges = [("H", "e"), ("l", "l"), ("▁", "x"), ("He", "ll"), ("Hell", "o"), ("▁", "Hello")]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


@pytest.mark.parametrize("format", ["merged_16bit", "lora"])
def test_text_behind_special_tokens_comes_back_as_it_was(tiny_llama, tmp_path, format):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    write_llama2_tokenizer(base)
    right = Tokenizer.from_file(str(base / "tokenizer.json")).encode("x</s>Hello").ids
    model = load(base)
    assert model.tokenizer("x</s>Hello", add_special_tokens=False)["input_ids"] == right
    folder = export_model(model, format, tmp_path / "out").path
    for again in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert again("x</s>Hello", add_special_tokens=False)["input_ids"] == right
