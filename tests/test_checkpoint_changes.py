"""Checkpoints whose numbers or tensors cannot be right, and bases that are not what they were."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit import attach_lora, export_model, load_quantized
from qlora_kit.errors import UnsupportedModelError
from qlora_kit.weights.fingerprint import fingerprint_weights
from qlora_kit.weights.merge_base import find_changed_file

WEIGHTS = "model.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "base")


def _change(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _load(folder, **arguments):
    return load_quantized(folder, 64, "float32", engine="native", **arguments)


def _drop_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    # Lists as long as the layers, which transformers compares with their number itself.
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


def _poke(name, value):
    def change(tensors):
        tensors[name].view(-1)[tensors[name].numel() // 2] = value

    return lambda folder: _change(folder, change)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop_layer, r"\d+ tensors that the model of its config.json has no place for.*rs\.1"),
        (lambda folder: _change(folder, lambda t: t.update(adapter=torch.ones(3))), "as adapter"),
        (_poke(NORM, float("nan")), f"{NORM} holds numbers that are infinite or not a number"),
        (_poke(PROJECTION, float("inf")), f"{PROJECTION} holds numbers that are infinite"),
        (
            lambda folder: _change(
                folder, lambda t: t.update({PROJECTION: t[PROJECTION].to(torch.int8)})
            ),
            rf"{PROJECTION} as whole numbers \(int8\)",
        ),
    ],
    ids=["fewer layers", "unknown tensor", "nan", "inf", "integers"],
)  # fmt: skip
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_what_would_load_as_another_model_is_refused(base, damage, said, load_in_4bit):
    damage(base)
    with pytest.raises(UnsupportedModelError, match=said):
        _load(base, load_in_4bit=load_in_4bit)


def test_parts_that_are_not_text_and_tables_are_left_out(base, caplog):
    beside = {"vision_tower.layers.0.weight": torch.ones(2, 2)}
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _change(base, lambda tensors: tensors.update(beside | tables))
    _load(base, load_in_4bit=False)
    assert "1 tensors of" in caplog.text
    assert "vision_tower.layers.0.weight" in caplog.text
    assert "inv_freq" not in caplog.text


def test_the_fingerprint_is_of_the_content(tiny_llama, base):
    from transformers import AutoModelForCausalLM

    original = fingerprint_weights(tiny_llama, is_quantized=False)
    assert fingerprint_weights(base, is_quantized=False) == original
    # Spread over several files.
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    model.save_pretrained(base / "shards", max_shard_size="100KB")
    assert len(list((base / "shards").glob("*.safetensors"))) > 1
    assert fingerprint_weights(base / "shards", is_quantized=False) == original
    _poke(PROJECTION, 0.123)(base)
    changed = fingerprint_weights(base, is_quantized=False)
    assert changed != original
    # The same numbers elsewhere.
    _change(base, lambda tensors: tensors.update({NORM: tensors[NORM].flip(0)}))
    _change(base, lambda t: t[NORM].view(-1)[:1].add_(1))
    assert fingerprint_weights(base, is_quantized=False) != changed


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"]
)
def test_numbers_that_are_none_are_found_in_every_dtype(dtype, tmp_path):
    size = getattr(torch, dtype).itemsize
    tops = range(256) if size == 1 else (0x00, 0x3F, 0x7B, 0x7C, 0x7F, 0x80, 0xFB, 0xFC, 0xFF)
    lower = [()] if size == 1 else [(0x00,), (0x7F,), (0x80,), (0xEF,), (0xF0,), (0xFF,)]
    words = [bytes([0] * (size - 1 - len(low)) + [*low, top]) for top in tops for low in lower]
    numbers = torch.frombuffer(bytearray(b"".join(words)), dtype=getattr(torch, dtype))
    is_finite = torch.isfinite(numbers.double())
    assert 0 < int((~is_finite).sum()) < len(numbers) / 2
    for number, finite in zip(numbers, is_finite, strict=True):
        save_file({"w": torch.stack([numbers[0], number])}, tmp_path / "model.safetensors")
        if finite:
            fingerprint_weights(tmp_path, is_quantized=False)
        else:
            with pytest.raises(UnsupportedModelError, match="infinite or not a number"):
                fingerprint_weights(tmp_path, is_quantized=False)


@pytest.mark.parametrize("is_prequantized", [False, True])
def test_a_base_that_changed_since_it_was_loaded_is_noticed(
    base, is_prequantized, tmp_path, caplog
):
    if is_prequantized:
        export_model(attach_lora(_load(base), r=2), "merged_4bit", tmp_path / "nf4", verify=False)
        base = tmp_path / "nf4"
    model = attach_lora(_load(base), r=2)
    # Touched, with the same content.
    for name in (WEIGHTS, "config.json"):
        os.utime(base / name, ns=(1, 1))
    export_model(model, "merged_16bit", tmp_path / "touched", verify=False)
    assert "changed since" not in caplog.text
    name = next(n for n in load_file(base / WEIGHTS) if n.endswith("norm.weight"))
    _poke(name, 0.125)(base)
    for name in ("merged_16bit", "merged_4bit", "gguf"):
        with pytest.raises(UnsupportedModelError, match="changed since the model was loaded"):
            export_model(model, name, tmp_path / name, verify=False)
    export_model(model, "lora", tmp_path / "lora", verify=False)
    assert "the base there is not the one in memory" in caplog.text


def test_a_configuration_that_changed_is_noticed_and_a_touched_one_is_not(base):
    model = attach_lora(_load(base), r=2)
    os.utime(base / "config.json", ns=(1, 1))
    assert find_changed_file(model) is None
    # As long as before.
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    assert find_changed_file(model) == "config.json"


def test_an_adapter_on_another_base_of_the_same_shape_is_told_of(base, tmp_path, caplog):
    folder = tmp_path / "lora"
    export_model(attach_lora(_load(base), r=2), "lora", folder, verify=False)
    load_quantized(folder, 64, "float32")
    assert "not the one that" not in caplog.text
    _poke(NORM, 0.125)(base)
    load_quantized(folder, 64, "float32")
    assert f"The base in {base} is not the one that the adapter in {folder} was" in caplog.text
    caplog.clear()
    adapter = load_file(folder / "adapter_model.safetensors")
    save_file({n: t + 1 for n, t in adapter.items()}, folder / "adapter_model.safetensors")
    load_quantized(folder, 64, "float32")
    assert "adapter_model.safetensors is not the file that the manifest" in caplog.text
