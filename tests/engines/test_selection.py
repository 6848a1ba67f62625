"""Which engine ``auto`` takes, and which architectures the native one computes itself."""

import importlib.util
import json

import pytest
import torch
import transformers

from qlora_kit.engines.native.layers.architectures import find_architecture_obstacle
from qlora_kit.engines.selection import _choose

COVERED = {
    "LlamaConfig": {},
    "MistralConfig": {},
    "Qwen2Config": {"use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 2},
    "Qwen3Config": {},
    "Gemma3TextConfig": {},
    "Phi3Config": {"pad_token_id": 0},
}
REFUSED = [
    ("PhiConfig", {}, "of no family that it computes"),
    ("LlamaConfig", {"hidden_act": "tanh"}, "activation is tanh"),
    ("LlamaConfig", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("LlamaConfig", {"rope_scaling": {"rope_type": "proportional"}}, "'proportional'"),
]


@pytest.fixture
def a_gpu(monkeypatch):
    """What torch says on a machine with one; nothing is computed."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed (the extra qlora-kit[unsloth])")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def _write(folder, config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", COVERED)
def test_on_a_gpu_native_trains_what_it_computes_itself(name, tmp_path, a_gpu):
    config = getattr(transformers, name)(**COVERED[name])
    config.save_pretrained(tmp_path)
    engine, reason = _choose(tmp_path)
    assert engine == "native"
    assert "itself" in reason


@pytest.mark.parametrize(("name", "settings", "said"), REFUSED)
def test_on_a_gpu_unsloth_trains_what_native_would_leave_to_trl(
    name, settings, said, tmp_path, a_gpu
):
    getattr(transformers, name)(**settings).save_pretrained(tmp_path)
    engine, reason = _choose(tmp_path)
    assert engine == "unsloth"
    assert said in reason


def test_without_a_gpu_it_is_native_whatever_the_model(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    transformers.PhiConfig().save_pretrained(tmp_path)
    assert _choose(tmp_path)[0] == "native"


def test_files_written_before_transformers_5_are_read_as_it_reads_them():
    """``rope_scaling`` with ``type``, one or one per type of layer; texts within other models."""
    llama = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert find_architecture_obstacle(llama) is None
    assert "proportional" in find_architecture_obstacle(
        {"model_type": "llama", "rope_scaling": {"type": "proportional"}}
    )
    longrope = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 2048}  # fmt: skip
    older = [
        {"model_type": "mistral"},
        {"model_type": "phi3", "rope_scaling": longrope},
        {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"model_type": "gemma3", "text_config": {"sliding_window": 512}},
        {"model_type": "gemma2", "hidden_activation": "tanh"},
        {"model_type": "starcoder2", "residual_dropout": 0.1},
    ]
    for raw in older:
        made = transformers.AutoConfig.for_model(**raw).to_dict()
        assert find_architecture_obstacle(raw) == find_architecture_obstacle(made), raw
    # Classes that a checkpoint offers and nobody asked for change nothing.
    assert find_architecture_obstacle({"model_type": "llama", "auto_map": {}}) is None
