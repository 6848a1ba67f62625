"""A base in shards: what is refused, and what stands in for weights that are elsewhere.

Training in shards is compared with training whole in tests/test_ranks.py, in two processes.
"""

from __future__ import annotations

import pytest
import torch

from qlora_kit import export_model, load_quantized, ranks, train_sft
from qlora_kit.config import LoadConfig
from qlora_kit.engines.native.sharding import shards
from qlora_kit.engines.unsloth import UnslothEngine
from qlora_kit.errors import ConfigError, EngineError, UnsupportedModelError
from qlora_kit.weights.absent import is_absent, make_absent

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4


def test_a_stand_in_shows_everything_and_holds_nothing():
    tensor = torch.ones(64, 32)
    absent = make_absent(tensor)
    assert (absent.shape, absent.dtype, absent.device) == (
        tensor.shape,
        tensor.dtype,
        tensor.device,
    )
    assert is_absent(absent)
    assert is_absent(absent.view(-1, 1))
    assert not is_absent(tensor)
    assert not is_absent(tensor[:2])
    # Whoever computes with it all the same sees so.
    assert torch.nn.functional.linear(torch.ones(1, 32), absent).isnan().all()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_layers_that_were_given_up_come_back_to_the_bit(make_adapted, load_in_4bit):
    model = make_adapted(load_in_4bit=load_in_4bit).model
    second = ranks.Node((0, 1), 1, None)
    layers = shards._find_layers(model)
    before = [
        {name: part.clone() for name, part in shards._take_apart(weight).items()}
        for _, _, weight in shards._find_weights(layers[0])
    ]
    whole = shards.held_bytes(model)
    shards.give_up_layers(model, second)
    assert shards.has_absent(model)
    assert shards.held_bytes(model) == pytest.approx(whole / 2, rel=1e-3)
    for (module, name, weight), parts in zip(shards._find_weights(layers[0]), before, strict=True):
        shards._put_together(module, name, weight, parts)
    assert not shards.has_absent(model)
    after = [shards._take_apart(weight) for _, _, weight in shards._find_weights(layers[0])]
    for parts, its in zip(before, after, strict=True):
        assert parts.keys() == its.keys()
        assert all(torch.equal(parts[name], its[name]) for name in parts)


def test_what_is_elsewhere_is_not_exported(make_adapted, tmp_path):
    model = make_adapted()
    shards.give_up_layers(model.model, ranks.Node((0, 1), 1, None))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0.*is on another rank.*shard=False"):
        export_model(model, "merged_16bit", tmp_path / "out")


def test_one_process_has_nobody_to_share_with(tiny_llama, make_adapted, tmp_path):
    with pytest.raises(ConfigError, match="Start one process per card"):
        load_quantized(tiny_llama, 64, "float32", shard=True)
    with pytest.raises(ConfigError, match="'auto'"):
        load_quantized(tiny_llama, 64, "float32", shard="always")
    model = make_adapted()
    settings = {"max_steps": 1, "output_dir": tmp_path, "optim": "adamw_torch"}
    with pytest.raises(ConfigError, match="Start one process per card"):
        train_sft(model, ROWS, plan={"shard": True}, **settings)
    # Through TRL and peft there are no shards at all.
    with pytest.raises(EngineError, match="label_smoothing_factor"):
        train_sft(model, ROWS, plan={"shard": True}, label_smoothing_factor=0.1, **settings)


def test_unsloth_shares_nothing():
    config = LoadConfig("model", shard=True)
    with pytest.raises(ConfigError, match="is the native engine's"):
        UnslothEngine.load(object.__new__(UnslothEngine), config)
