"""Adapters whose start took a part out of the base come back to the base they belong to."""

import pytest

from checkpoints import randomize
from forward import logits_of
from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized, train_sft
from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.weights.merged import MergedWeights

NAME = "model.layers.1.mlp.down_proj.weight"


def load(folder, dtype="bfloat16"):
    return load_quantized(folder, 64, dtype, load_in_4bit=False, engine="native")


def base_weight(model):
    return model.model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight


@pytest.mark.parametrize("start", ["pissa_niter_2", pytest.param("olora", marks=pytest.mark.slow)])
def test_a_checkpoint_comes_back_exactly(tiny_llama, tmp_path, alpaca_rows, start):
    import torch

    model = attach_lora(load(tiny_llama), r=4, use_rslora=True, init_lora_weights=start)
    rows = AlpacaFormatter(model.tokenizer).load(alpaca_rows)
    train_sft(
        model, rows, output_dir=tmp_path, max_steps=1, save_steps=1, learning_rate=1e-2,
        save_strategy="steps", disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(5)
    again = load(tmp_path / "checkpoint-1")
    assert torch.equal(base_weight(again), base_weight(model))
    assert not torch.equal(
        base_weight(again), load(tiny_llama).model.model.layers[1].mlp.down_proj.weight
    )
    assert torch.equal(logits_of(again.model), logits_of(model.model))
    for other in (model, again):
        with MergedWeights(other) as merged:
            right = base_weight(model).float() + other.model.get_base_model().model.layers[
                1
            ].mlp.down_proj.get_delta_weight("default")
            assert torch.allclose(merged.load(NAME).cpu(), right.cpu(), atol=1e-6)
    # And once more: a checkpoint of what came back, and the adapter on the base as it is on disk.
    train_sft(again, rows, output_dir=tmp_path / "more", max_steps=1, save_steps=1,
              save_strategy="steps", disable_tqdm=True)  # fmt: skip
    third = load(tmp_path / "more" / "checkpoint-1")
    assert torch.equal(base_weight(third), base_weight(model))
    # A run goes on with the base it began with, or not at all.
    if start != "olora":
        other = attach_lora(
            load(tiny_llama), r=4, use_rslora=True, init_lora_weights=start, random_state=1
        )
        with pytest.raises(ConfigError, match=r"random_state=3407.*Load the checkpoint itself"):
            train_sft(
                other, rows, output_dir=tmp_path, max_steps=2, resume_with_changes=True,
                resume_from_checkpoint=tmp_path / "checkpoint-1",
            )  # fmt: skip
    folder = export_model(third, "lora", tmp_path / "lora").path
    plain = load(folder)
    assert (logits_of(plain.model) - logits_of(third.model)).abs().max() < 0.05


def test_what_plain_peft_keeps_of_a_start_decides(tiny_llama, tmp_path):
    """peft computes OLoRA's start again; PiSSA by a randomized SVD it would draw anew."""
    import torch

    for start in ("pissa", "olora"):
        model = randomize(attach_lora(load(tiny_llama, "float32"), r=4, init_lora_weights=start))
        model.model.save_pretrained(tmp_path / start)
        again = load(tmp_path / start, "float32")
        torch.testing.assert_close(logits_of(again.model), logits_of(model.model))
    model = attach_lora(load(tiny_llama, "float32"), r=4, init_lora_weights="pissa_niter_2")
    model.model.save_pretrained(tmp_path / "random")
    with pytest.raises(UnsupportedModelError, match=r"pissa_niter_2.*does not keep.*'lora'"):
        load(tmp_path / "random")


def test_a_start_that_this_machine_does_not_repeat(tiny_llama, tmp_path, caplog):
    import dataclasses

    from qlora_kit.engines.adapter_start import write_start

    model = randomize(attach_lora(load(tiny_llama), r=4, init_lora_weights="pissa_niter_2"))
    model.model.save_pretrained(tmp_path)
    # Drawn on another machine: what was saved of the start makes the base.
    write_start(dataclasses.replace(model.start, random_state=1), tmp_path)
    again = load(tmp_path)
    assert "exact to the rounding of bfloat16" in caplog.text
    assert (base_weight(again) - base_weight(model)).abs().max() < 2e-3
    # The start of an adapter of more layers.
    factors = dict(model.start.factors)
    factors["lm_head.lora_A"] = next(iter(factors.values())).clone()
    write_start(dataclasses.replace(model.start, factors=factors, digest=""), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"adapter_start.safetensors does not belong"):
        load(tmp_path)
    (tmp_path / "adapter_start.safetensors").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"adapter_start.safetensors is damaged"):
        load(tmp_path)
