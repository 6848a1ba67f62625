"""Compiled functions in a process that has compiled many, and without a compiler."""

import logging

import pytest
import torch

from qlora_kit.engines.native.layers.compilation import (
    Compiled,
    find_compile_obstacle,
    find_too_short,
)


def _double(x):
    return x * 2 + 1


@pytest.fixture
def one_graph_per_function():
    obstacle = find_compile_obstacle(torch.device("cpu"))
    if obstacle:
        pytest.skip(f"torch.compile does not run here: {obstacle}")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        yield
    torch._dynamo.reset()


def test_other_models_of_the_process_do_not_use_up_its_graphs(one_graph_per_function, caplog):
    first = Compiled(_double, True, torch.device("cpu"), "a test")
    second = Compiled(_double, True, torch.device("cpu"), "a test")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(first(torch.ones(3)), torch.full((3,), 3.0))
        wide = torch.ones(3, dtype=torch.float64)
        assert torch.equal(second(wide), torch.full((3,), 3.0, dtype=torch.float64))
    assert second.is_compiled
    assert "without torch.compile" not in caplog.text


def test_what_needs_too_many_graphs_itself_runs_plainly_and_says_so(one_graph_per_function, caplog):
    compiled = Compiled(_double, True, torch.device("cpu"), "a test")
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.float64, torch.float16):
            expected = torch.full((3,), 3.0, dtype=dtype)
            assert torch.equal(compiled(torch.ones(3, dtype=dtype)), expected)
    assert not compiled.is_compiled
    assert "Running a test without torch.compile" in caplog.text


def test_a_run_on_a_cpu_compiles_when_it_is_long_enough():
    cpu = torch.device("cpu")
    assert "60 steps of about 500 tokens" in find_too_short(cpu, 60, 500, 135_000_000)
    assert find_too_short(cpu, 10**6, 500, 135_000_000) is None
    assert find_too_short(torch.device("cuda"), 1, 1, 1) is None


def test_a_short_training_is_not_compiled_unless_asked_to(make_adapted, make_trainer, caplog):
    if obstacle := find_compile_obstacle(torch.device("cpu")):
        pytest.skip(f"torch.compile does not run here: {obstacle}")
    model = make_adapted()
    if model.model.device.type != "cpu":
        pytest.skip("compiles on CUDA whatever the length")
    with caplog.at_level("INFO"):
        trainer = make_trainer(model, {"enabled": True}, max_steps=1)
        trainer.train()
    assert not trainer.fast_plan.is_compiled
    assert "not compiled" in str(trainer.fast_plan)
    assert "it pays off from" in caplog.text
