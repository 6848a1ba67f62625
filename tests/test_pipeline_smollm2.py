"""The whole pipeline on real weights: SmolLM2-135M, from a GGUF file to exports read elsewhere."""

import json

import pytest

from qlora_kit import (
    AlpacaFormatter,
    attach_lora,
    export_model,
    generate_stream,
    load_quantized,
    train_sft,
)

QUESTION = ("Write a field guide entry.", "Snow leopard")


@pytest.fixture(scope="module")
def base(smollm2, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_quantized(smollm2, max_seq_length=512, dtype="bfloat16", cache_dir=cache)


def _answer(model, formatter):
    chunks = list(generate_stream(model, formatter.prompt(*QUESTION), max_new_tokens=40))
    return "".join(chunk.text for chunk in chunks), chunks


def test_the_tokenizer_of_the_file_is_the_models_own(base):
    tokenizer = base.tokenizer
    # transformers takes <|im_start|> for the end and forgets to split digits.
    assert tokenizer.eos_token == "<|im_end|>"
    assert base.base.stop_token_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    text = "Fibonacci: 1, 1, 2, 3, 5, 8 – naïve 你好 🦊\n\n\tend"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert 1 in ids, "special tokens of the template are single ids"
    assert 2 in ids


@pytest.fixture(scope="module")
def trained(base, field_guide, tmp_path_factory):
    """A few steps, enough for the form of the answer to change."""
    formatter = AlpacaFormatter(base.tokenizer, response_only=True)
    before, _ = _answer(base, formatter)
    model = attach_lora(base, r=16, lora_alpha=16)
    result = train_sft(
        model,
        formatter.load(field_guide),
        max_steps=10,
        learning_rate=2e-3,
        warmup_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        output_dir=tmp_path_factory.mktemp("training"),
    )
    return model, formatter, before, result


def test_training_lowers_the_loss_and_changes_the_answer(trained):
    model, formatter, before, result = trained
    assert result.losses[-1] < 0.5 * result.losses[0]
    after, chunks = _answer(model, formatter)
    assert after != before
    assert "NAME:" not in before
    assert after.startswith("NAME: snow leopard | HOME:")
    assert len(chunks) > 8, "the answer must come piece by piece"
    assert chunks[-1].finish_reason == "eos"
    assert chunks[-1].token_count < 40


def test_the_adapter_answers_alike_in_plain_peft(trained, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    model, formatter, _, _ = trained
    # What plain peft makes of it is the check.
    export_model(model, "lora", tmp_path / "lora", verify=False)
    base = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        ),
        str(tmp_path / "lora"),
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lora")
    prompt = formatter.prompt(*QUESTION)
    ids = torch.tensor([tokenizer(str(prompt))["input_ids"]], device=model.model.device)
    assert ids[0].tolist() == list(prompt.token_ids)
    with torch.no_grad(), model.engine.inference(model) as live:
        expected = live(ids).logits.float().log_softmax(-1)
        got = plain(ids).logits.float().log_softmax(-1)
    # Elsewhere bitsandbytes packs the weights on CPUs with AVX512-BF16, which rounds their scales.
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 2e-2


def test_the_merged_model_answers_in_plain_transformers(trained, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, formatter, _, _ = trained
    artifact = export_model(model, "merged_16bit", tmp_path / "merged")
    checks = {check.name: check for check in artifact.verification.checks}
    assert checks["logits"].passed
    assert artifact.facts["base"] == "dequantized"
    assert artifact.facts["kl"] < 0.05
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer(str(formatter.prompt(*QUESTION)), return_tensors="pt")
    new = plain.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).startswith("NAME: snow leopard | HOME:")
    assert int(new[-1]) == tokenizer.eos_token_id == 2


@pytest.mark.slow
def test_the_classic_script_from_end_to_end(smollm2, field_guide, tmp_path):
    """The issue's script at its full length, with what it leaves behind."""
    model = load_quantized(smollm2, max_seq_length=2048, load_in_4bit=True, local_files_only=True)
    model = attach_lora(model, r=16, lora_alpha=16)
    formatter = AlpacaFormatter(model.tokenizer)
    rows, held_out = formatter.load(field_guide).split(0.1, seed=0)
    result = train_sft(
        model, rows, max_steps=60, output_dir=tmp_path / "out", eval_dataset=held_out
    )
    assert result.steps == len(result.losses) == 60
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.eval_losses[-1][1] < result.eval_losses[0][1]
    assert (tmp_path / "out" / "checkpoint-60" / "adapter_model.safetensors").is_file()
    after, _ = _answer(model, formatter)
    # The form is learned; 60 steps at the script's learning rate leave the other fields to chance.
    assert after.startswith("NAME: snow leopard | ")
    for name in ("lora", "merged_16bit"):
        assert export_model(model, name, tmp_path / name, verify="full").verification.passed
    again = load_quantized(tmp_path / "lora", max_seq_length=2048, is_trainable=False)
    assert _answer(again, again.record.formatter)[0] == after
