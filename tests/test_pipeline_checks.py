"""What holds an export to the model it came from, across stages."""

import json
import re

from checkpoints import make_checkpoint
from qlora_kit import (
    AlpacaFormatter,
    attach_lora,
    export_model,
    generate_stream,
    load_quantized,
    train_sft,
)
from qlora_kit.verification.checkpoint import load_exported
from qlora_kit.verification.checks import make_probes, read_logits
from qlora_kit.verification.original import attach_live_adapters, check_against_original


def test_a_merge_into_the_original_is_held_against_the_original(make_adapted, tmp_path):
    """Where quantization takes much, the 4-bit model says little about a merge."""
    base = make_checkpoint(tmp_path / "base", "llama", initializer_range=0.3)
    model = make_adapted(base, std=0.3)
    artifact = export_model(model, "merged_16bit", tmp_path / "right", base="original")
    (logits,) = [check for check in artifact.verification.checks if check.name == "logits"]
    assert logits.passed
    moved = float(re.search(r"From the nf4 model: (\S+) nats", logits.detail)[1])
    assert moved > 20 * logits.value
    # The same folder, held against a model that learned something else.
    other = make_adapted(base, std=0.4)
    exported, original = (
        load_exported(other, folder, dtype="float32") for folder in (tmp_path / "right", base)
    )
    probes = make_probes(other)
    expected = read_logits(attach_live_adapters(other, original), probes)
    wrong, _ = check_against_original(other, exported, expected, probes, limit=logits.tolerance)
    assert not wrong.passed


def test_every_kind_of_adapter_is_copied_for_that_comparison(make_adapted, tmp_path):
    for number, options in enumerate(
        (
            {"use_dora": True},
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
            {"modules_to_save": ["lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
        )
    ):
        artifact = export_model(
            make_adapted(**options), "merged_16bit", tmp_path / str(number), base="original"
        )
        (logits,) = [check for check in artifact.verification.checks if check.name == "logits"]
        assert logits.value < 1e-3, options


def test_the_whole_pipeline_touches_no_network(
    tiny_llama, alpaca_rows, tmp_path, no_network, monkeypatch
):
    # The environment's own offline switch must not be what keeps us off the network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    rows_path = tmp_path / "rows.json"
    rows_path.write_text(json.dumps(alpaca_rows), encoding="utf-8")
    model = load_quantized(tiny_llama, 128, "float32", local_files_only=True)
    model = attach_lora(model, r=4)
    formatter = AlpacaFormatter(model.tokenizer)
    train_sft(
        model, formatter.load(str(rows_path)), max_steps=1, output_dir=tmp_path / "out",
        disable_tqdm=True,
    )  # fmt: skip
    prompt = formatter.prompt("Say the number 3.")
    expected = [chunk.text for chunk in generate_stream(model, prompt, max_new_tokens=3)]
    for name in ("lora", "merged_16bit"):
        export_model(model, name, tmp_path / name, verify="full")
    again = load_quantized(tmp_path / "lora", 128, "float32", is_trainable=False)
    prompt = again.record.formatter.prompt("Say the number 3.")
    assert [c.text for c in generate_stream(again, prompt, max_new_tokens=3)] == expected
    assert no_network == []
