"""The plugin as its users get it: found by its entry point, held to the contract, run."""

import json

import pytest
from qlora_kit_ctranslate2 import CTranslate2Exporter, TranslationFormatter

import qlora_kit
from qlora_kit.errors import ConfigError, VerificationError
from qlora_kit.testing import check_exporter, check_formatter, make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny", load_in_4bit=False)


def test_qlora_kit_finds_it():
    listed = qlora_kit.describe_exporters()
    found = next(entry for entry in listed["exporters"] if entry["name"] == "ctranslate2")
    assert found["distribution"] == "qlora-kit-ctranslate2"
    assert found["is_available"], found["missing"]
    assert listed["broken"] == []


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "base": "dequantized"}])
def test_it_keeps_every_promise(options):
    check_exporter(CTranslate2Exporter(), options=options)


def test_the_formatter_keeps_every_promise():
    check_formatter(TranslationFormatter, options={"language": "German"})


def test_an_export_comes_back_with_the_formatter(model, tmp_path):
    from qlora_kit.data import plan_formatter

    assert plan_formatter(template="translation").kind is TranslationFormatter
    before = model.record.formatter
    model.record.formatter = TranslationFormatter(model.tokenizer, language="German")
    try:
        artifact = qlora_kit.export_model(model, "lora", tmp_path / "out", verify=False)
    finally:
        model.record.formatter = before
    again = qlora_kit.load_quantized(artifact.path, load_in_4bit=False).record.formatter
    assert isinstance(again, TranslationFormatter)
    assert again.prompt("A cat.") == "A cat.\n\nGerman: "


def test_ctranslate2_generates_what_the_live_model_generates(model, tmp_path):
    import ctranslate2
    from transformers import AutoTokenizer

    artifact = qlora_kit.export_model(
        model, "ctranslate2", tmp_path / "out", quantization="float32"
    )
    assert artifact.verification.passed
    generator = ctranslate2.Generator(str(artifact.path), compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    prompt = "### Instruction:\nName a primary color.\n\n### Response:\n"
    ids = tokenizer(prompt)["input_ids"]
    result = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)],
        max_length=12,
        end_token=artifact.facts["stop_token_ids"],
        include_prompt_in_result=False,
    )
    chunks = qlora_kit.generate_stream(model, prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(result[0].sequences_ids[0]) == "".join(chunk.text for chunk in chunks)


def test_the_quantizations_differ_in_size_and_distance(model, tmp_path):
    results = {
        quantization: qlora_kit.export_model(
            model, "ctranslate2", tmp_path / quantization, quantization=quantization
        )
        for quantization in ("int8", "float32")
    }
    size = {name: (made.path / "model.bin").stat().st_size for name, made in results.items()}
    assert size["int8"] < 0.3 * size["float32"]
    distance = {
        name: next(check.value for check in made.verification.checks if check.name == "logits")
        for name, made in results.items()
    }
    assert distance["float32"] < distance["int8"]


def test_int8_is_refused_for_a_model_that_does_not_bear_it(tmp_path):
    import torch

    model = make_tiny_model(tmp_path / "base", load_in_4bit=False)
    with torch.no_grad():
        for layer in model.model.base_model.model.model.layers:
            # One channel a hundred times the others, as real models have them.
            layer.input_layernorm.weight[3] *= 100
    with pytest.raises(VerificationError, match="int8 may be too coarse for this model: quantiz"):
        qlora_kit.export_model(model, "ctranslate2", tmp_path / "out", quantization="int8")
    assert not (tmp_path / "out").exists()
    qlora_kit.export_model(model, "ctranslate2", tmp_path / "out")


def test_together_with_a_built_in_the_merge_is_shared(model, tmp_path):
    results = qlora_kit.export_model(model, ["ctranslate2", "merged_16bit"], tmp_path)
    results.raise_for_failures()
    assert json.loads((tmp_path / "ctranslate2" / "config.json").read_text())["eos_token"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctranslate2", "merged_16bit"]


def test_wrong_options_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"quantization must be 'bfloat16' or .*, got 'int4'"):
        qlora_kit.export_model(model, "ctranslate2", tmp_path / "out", quantization="int4")
    assert not (tmp_path / "out").exists()
