"""A tokenizer does what its own file says, whatever class transformers chooses for it."""

import json
import shutil

import pytest
from tokenizers import Tokenizer

import gguf_tiny as tiny
from qlora_kit import attach_lora, export_model, load_quantized
from qlora_kit.engines.tokenizer import load_tokenizer
from qlora_kit.errors import UnsupportedModelError

TEXT = "Hello world, it's 12345 你好\n\n  x"


def write_tokenizer(folder, model_type, tokenizer_class):
    """A GPT-2-like tokenizer.json that declares a class that reads it wrongly."""
    folder.mkdir(exist_ok=True)
    tiny.byte_level_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [("llama", "LlamaTokenizerFast"), ("qwen2", "PreTrainedTokenizerFast"), ("qwen2", None),
     ("llama", "Qwen2Tokenizer"), ("qwen2", "LlamaTokenizer")],
)  # fmt: skip
def test_the_file_s_tokens_are_used(tmp_path, caplog, model_type, tokenizer_class):
    folder = write_tokenizer(tmp_path / "it", model_type, tokenizer_class)
    tokenizer = load_tokenizer(folder)
    right = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = right.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == right.decode(ids, skip_special_tokens=False) == TEXT
    assert "The file's are used" in caplog.text


def test_a_tokenizer_that_is_read_right_stays_as_it_is(tmp_path, caplog):
    folder = write_tokenizer(tmp_path / "it", "llama", "PreTrainedTokenizerFast")
    load_tokenizer(folder)
    assert caplog.text == ""


@pytest.mark.parametrize("format", ["merged_16bit", "lora"])
def test_exports_of_such_a_model_keep_the_file_s_tokens(tiny_llama, tmp_path, format):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {
        "tokenizer_class": "LlamaTokenizerFast"
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    model = load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    ids = Tokenizer.from_file(str(base / "tokenizer.json")).encode(TEXT, add_special_tokens=False)
    assert model.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids.ids
    artifact = export_model(attach_lora(model, r=2), format, tmp_path / "out")
    assert artifact.verification.passed
    again = load_quantized(artifact.path, 64, "float32", load_in_4bit=False, engine="native")
    assert again.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids.ids


def test_a_sentencepiece_model_that_is_read_wrongly_is_refused(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "the quick brown fox", "a b c d e f g"] * 20),
        model_prefix=str(tmp_path / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model does"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    folder = write_tokenizer(tmp_path / "it", "llama", "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    from qlora_kit.engines.tokenizer_file import match_with_file

    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json is damaged"):
        match_with_file(tokenizer, folder)
