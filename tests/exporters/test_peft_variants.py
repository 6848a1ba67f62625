"""What peft can do to a model beside LoRA on linear layers: merged exactly, kept, or refused."""

import pytest

from checkpoints import make_checkpoint
from exported import load_plain
from forward import logits_of
from qlora_kit import export_model, load_quantized
from qlora_kit.errors import UnsupportedModelError, VerificationError


def save_adapter(base, folder, **settings):
    """An adapter as plain peft writes it, and the logits of its model in plain peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(
        load_plain(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(model.eval())


def load(folder):
    return load_quantized(folder, 64, "float32", load_in_4bit=False, engine="native")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"layer_replication": [[0, 2], [1, 2]]}),
        pytest.param(
            "llama",
            {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj"]},
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", {"trainable_token_indices": [5, 300]}, marks=pytest.mark.slow),
        ("qwen3", {"trainable_token_indices": [5, 300]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [7], "lm_head": [2]}}),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
    ids=str,
)
def test_it_is_merged_as_peft_computes_it(tiny_llama, tiny_qwen3, tmp_path, kind, settings):
    import torch

    bases = {"llama": tiny_llama, "qwen3": tiny_qwen3}
    base = bases.get(kind) or make_checkpoint(tmp_path / "base", kind)
    right = save_adapter(base, tmp_path / "adapter", **settings)
    model = load(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(model.model), right)
    folder = export_model(
        model, "merged_16bit", tmp_path / "out", dtype="float16", verify="full"
    ).path
    again = load_plain(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), right, atol=3e-3, rtol=3e-3)
    export_model(model, "lora", tmp_path / "lora", verify="full")
    torch.testing.assert_close(logits_of(load(tmp_path / "lora").model), right)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_bias": True}, "nothing to merge it into"),
        ({"alora_invocation_tokens": [1, 2]}, "only after its invocation tokens"),
    ],
)
def test_what_cannot_be_merged_is_kept_by_lora(tiny_llama, tmp_path, settings, reason):
    import torch

    save_adapter(tiny_llama, tmp_path / "adapter", **settings)
    model = load(tmp_path / "adapter")
    for name in ("merged_16bit", "merged_4bit", "gguf"):
        with pytest.raises(UnsupportedModelError, match=rf"{reason}.*Format 'lora' keeps it"):
            export_model(model, name, tmp_path / "out")
    export_model(model, "lora", tmp_path / "lora", verify="full")
    torch.testing.assert_close(logits_of(load(tmp_path / "lora").model), logits_of(model.model))


def test_an_activated_lora_keeps_its_invocation_tokens_in_gguf(tiny_llama, tmp_path):
    from gguf import GGUFReader

    save_adapter(tiny_llama, tmp_path / "adapter", alora_invocation_tokens=[1, 77])
    artifact = export_model(load(tmp_path / "adapter"), "gguf-lora", tmp_path / "out")
    field = GGUFReader(artifact.path / artifact.facts["file"]).get_field(
        "adapter.alora.invocation_tokens"
    )
    assert list(field.contents()) == [1, 77]


def test_the_architecture_says_which_tensors_there_are(tmp_path, monkeypatch):
    """A merge that forgets a tensor forgets it in its own list too."""
    from qlora_kit.weights.merged import MergedWeights

    names = MergedWeights.names
    monkeypatch.setattr(
        MergedWeights, "names", lambda self: [n for n in names(self) if "norm" not in n]
    )
    model = load(make_checkpoint(tmp_path / "base", "llama"))
    with pytest.raises(VerificationError, match=r"architecture's tensors are missing.*norm"):
        export_model(model, "merged_16bit", tmp_path / "out")
    assert not (tmp_path / "out").exists()
