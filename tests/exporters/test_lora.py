"""``lora`` exports load in plain peft and give the live logits."""

import json

import pytest

from forward import logits_of
from qlora_kit import export_model, load_quantized
from qlora_kit.errors import UnsupportedModelError, VerificationError
from qlora_kit.exporters.lora import Lora


def load_in_plain_peft(base, folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "lora_alpha": 6},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_plain_peft_gives_the_live_logits(make_adapted, tiny_llama, tmp_path, options):
    import torch

    model = make_adapted(load_in_4bit=False, **options)
    artifact = export_model(model, "lora", tmp_path / "out", verify="full")
    assert artifact.verification.passed
    assert [check.name for check in artifact.verification.checks][-1] == "logits"
    again = load_in_plain_peft(tiny_llama, tmp_path / "out")
    torch.testing.assert_close(logits_of(again), logits_of(model.model), atol=2e-3, rtol=1e-3)


def test_the_folder_is_complete_and_loads_with_load_quantized(adapted, tiny_llama, tmp_path):
    import torch

    artifact = export_model(adapted, "lora", tmp_path / "out")
    names = {file.name for file in artifact.files}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "qlora_kit_manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert config["inference_mode"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "Rank 4, alpha 16" in card
    again = load_quantized(tmp_path / "out", 64, "float32", engine="native")
    assert torch.equal(logits_of(again.model), logits_of(adapted.model))


def test_the_cards_own_code_loads_the_adapter(adapted16, tmp_path, monkeypatch):
    import re

    import torch

    export_model(adapted16, "lora", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code, names)
    assert names["tokenizer"].chat_template == adapted16.tokenizer.chat_template
    actual = logits_of(names["model"].float())
    torch.testing.assert_close(actual, logits_of(adapted16.model), atol=2e-3, rtol=1e-3)


def test_the_export_stops_where_the_live_model_stops(make_adapted, tmp_path):
    from qlora_kit import AlpacaFormatter

    model = make_adapted()
    model.tokenizer.eos_token = "<|im_start|>"
    model.record.formatter = AlpacaFormatter(model.tokenizer)
    artifact = export_model(model, "lora", tmp_path / "out")
    stops = model.stop_token_ids
    assert set(stops) == {1, 2}
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == list(stops)
    assert next(c for c in artifact.verification.checks if c.name == "stop tokens").passed
    again = load_quantized(tmp_path / "out", 64, "float32", engine="native")
    # The tokenizer's end token comes first, and it came with the adapter.
    assert again.stop_token_ids == (1, 2)


def test_a_hub_name_stays_a_hub_name(adapted, tmp_path):
    import dataclasses

    base = dataclasses.replace(adapted.base, name_or_path="someone/some-model")
    model = dataclasses.replace(adapted, base=base)
    export_model(model, "lora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/some-model"
    assert "base_model: someone/some-model" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_an_adapter_is_refused(tiny_llama, tmp_path):
    base = load_quantized(tiny_llama, 64, engine="native")
    with pytest.raises(UnsupportedModelError, match=r"attach_lora first.*merged_16bit"):
        export_model(base, "lora", tmp_path / "out")


@pytest.mark.parametrize("damage", ["value", "missing", "truncated", "alpha", "eos"])
def test_a_broken_export_is_caught_and_removed(adapted, tmp_path, monkeypatch, damage):
    write = Lora.write

    def write_broken(self, request, folder):
        from safetensors.torch import load_file, save_file

        facts = write(self, request, folder)
        path = folder / "adapter_model.safetensors"
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage in ("value", "missing"):
            tensors = load_file(path)
            name = sorted(tensors)[3]
            if damage == "missing":
                del tensors[name]
            else:
                tensors[name][0, 0] += 1e-3
            save_file(tensors, path)
        else:
            name, key = {
                "alpha": ("adapter_config.json", "lora_alpha"),
                "eos": ("generation_config.json", "eos_token_id"),
            }[damage]
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**content, key: 1}))
        return facts

    monkeypatch.setattr(Lora, "write", write_broken)
    with pytest.raises(VerificationError, match="does not match the model in memory"):
        export_model(adapted, "lora", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error:.*loftq_config")
@pytest.mark.parametrize("arguments", [{"loftq_config": {"loftq_bits": 4}},
                                       {"init_lora_weights": "loftq"}])  # fmt: skip
def test_loftq_is_remembered_by_what_is_saved(make_adapted, alpaca_rows, tmp_path, arguments):
    from qlora_kit import AlpacaFormatter, train_sft
    from qlora_kit.weights.merge_base import choose_merge_base

    model = make_adapted(**arguments)
    formatter = AlpacaFormatter(model.tokenizer)
    train_sft(
        model, formatter.load(alpaca_rows), output_dir=tmp_path / "run", max_steps=1, save_steps=1,
        save_strategy="steps", disable_tqdm=True,
    )  # fmt: skip
    export_model(model, "lora", tmp_path / "out", verify="full")
    again = load_quantized(tmp_path / "out", 64, "float32", engine="native")
    export_model(again, "lora", tmp_path / "again")
    for folder in ("out", "again", "run/checkpoint-1"):
        loaded = load_quantized(tmp_path / folder, 64, "float32", engine="native")
        assert choose_merge_base(loaded, "auto") == "dequantized"
        expected = logits_of(model.model)
        assert (logits_of(loaded.model) - expected).abs().max() < 1e-4


def test_the_card_says_how_to_ask(adapted):
    from qlora_kit.artifacts.model_card import describe_merged
    from qlora_kit.data import AlpacaFormatter, ChatFormatter, TextFormatter

    def describe(formatter):
        adapted.record.formatter = formatter
        try:
            card = describe_merged(adapted, "me/model", "merged_16bit")
        finally:
            adapted.record.formatter = None
        return card.partition("## Prompt template")[2]

    tokenizer = adapted.tokenizer
    alpaca = describe(AlpacaFormatter(tokenizer, "Q: {instruction} {input}\nA: {output}"))
    assert "````text\nQ: {instruction} {input}\nA: \n````" in alpaca
    assert alpaca.count("Prompts") == 1
    stanford = describe(AlpacaFormatter(tokenizer))
    assert "Prompts without an input:" in stanford
    assert stanford.count("### Response:") == 2
    assert "Answers end with `<|im_end|>`." in stanford
    assert "chat template" in describe(ChatFormatter(tokenizer))
    assert "as it is" in describe(TextFormatter(tokenizer))
    assert describe(None) == ""
