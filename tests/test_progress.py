"""How a run's progress looks where there is no terminal."""

import sys
from types import SimpleNamespace

import pytest

from qlora_kit import progress
from qlora_kit.engines.native.layers import compilation
from qlora_kit.training.notices import describe_first_step


def test_a_pipe_gets_lines_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0.0)
    with progress.open_progress(3, "training", "steps", done=1) as shown:
        shown.set_postfix_str("loss 1.000")
        shown.update()
        shown.update()
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = printed.splitlines()
    assert lines[0].startswith("training 1/3 steps, ")
    assert lines[1].startswith("training 2/3 steps, ")
    assert lines[1].endswith("loss 1.000")
    assert lines[-1].startswith("training 3/3 steps, ")


def test_lines_are_far_apart_and_the_end_is_told(capsys):
    with progress.open_progress(100, "training", "steps") as shown:
        for _ in range(100):
            shown.update()
            shown.set_postfix_str("loss", refresh=True)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("training 0/100 steps")
    assert last.startswith("training 100/100 steps")
    with progress.open_progress(100, "Tokenizing", "rows", hidden=True) as hidden:
        hidden.update(100)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.open_progress(2, "training", "steps", bar="{desc} {n_fmt} |{bar:4}|") as shown:
        shown.update(2)
    assert "\rtraining 2 |████|" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "plan", "settings", "said"),
    [
        (10, None, {}, ""),
        (10**9, None, {}, "compiling"),
        (10, {"compile": True}, {}, "compiling"),
        (10**9, {"compile": False}, {}, ""),
        (10, None, {"torch_compile": True}, "minutes"),
    ],
)
def test_compiling_is_spoken_of_where_something_compiles(monkeypatch, steps, plan, settings, said):
    import torch

    monkeypatch.setattr(compilation, "find_compile_obstacle", lambda device: None)
    args = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
        **{"torch_compile": False, **settings},
    )  # fmt: skip
    run = SimpleNamespace(
        job=SimpleNamespace(args=args, plan=plan),
        device=torch.device("cpu"),
        data=SimpleNamespace(dataset=range(10), summary={"report": {"tokens": 1000}}),
    )
    trainer = SimpleNamespace(uses_fast_step=True)
    text = describe_first_step(trainer, run, SimpleNamespace(total_parameters=10**8), steps)
    assert said in text
    assert bool(text) == bool(said)
