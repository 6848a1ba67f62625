"""float16: scaled losses give the gradients, and steps beyond its range are skipped and counted."""

import logging
from types import SimpleNamespace

import pytest
import torch

from fast_gradients import compute_fast, compute_reference
from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.step_runner import StepRunner
from qlora_kit.engines.native.loss_scale import check_float16
from qlora_kit.errors import EngineError

ROWS = 6


def test_a_scaled_step_has_the_gradients_and_skips_what_overflows(make_adapted, token_rows):
    wide = make_adapted("llama", load_in_4bit=False, modules_to_save=["lm_head"]).model
    loss, expected, count = compute_reference(wide, token_rows[:ROWS])
    model = make_adapted(
        "llama", dtype="float16", load_in_4bit=False, modules_to_save=["lm_head"]
    ).model
    _, _, _, fused_model = compute_fast(model, token_rows[:ROWS], count)
    runner, examples = StepRunner(fused_model), split_rows(token_rows[:ROWS])
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    adapters = [one for name, one in trained.items() if "lora_" in name]
    optimizer = torch.optim.SGD(adapters, lr=0.1)
    scaler = torch.amp.GradScaler(model.device.type, init_scale=2.0**12)
    scaled_loss, _ = runner.run_step(examples, count, scaler)
    assert float(scaled_loss) == pytest.approx(loss, rel=5e-3)
    for name, parameter in trained.items():
        found = parameter.grad.float() / 2.0**12
        error = (found - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, (name, float(error))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    before = [one.detach().clone() for one in adapters]
    scaler = torch.amp.GradScaler(model.device.type, init_scale=2.0**40)
    runner.run_step(examples, count, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(one, old) for one, old in zip(adapters, before, strict=True))


def test_what_no_scaler_does_is_refused_or_said(make_adapted, caplog):
    model = make_adapted("llama", dtype="float16", modules_to_save=["lm_head"]).model
    with pytest.raises(EngineError, match=r"lm_head.* is float16 and to be trained in full"):
        check_float16(model, SimpleNamespace(fp16=True))
    with caplog.at_level(logging.WARNING):
        check_float16(model, SimpleNamespace(fp16=False))
    assert "without a loss scaler" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_in_float16_is_the_one_in_bfloat16(make_adapted, make_trainer, tmp_path):
    losses = []
    for dtype in ("bfloat16", "float16"):
        adapted = make_adapted("qwen3", dtype=dtype)
        half = dtype == "float16"
        plan = {"compile": False, "enabled": True}
        settings = {"fp16": half, "bf16": not half, "save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(adapted, plan, **settings)
        trainer.train()
        losses.append(trainer.step_losses)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    last = [one for one in trainer.state.log_history if "loss_scale" in one][-1]
    scale, skipped = last["loss_scale"], last["skipped_steps"]
    # It starts at 65,536 and is halved with every step that it loses.
    assert scale == 2.0 ** (16 - skipped)
    assert skipped <= 4
    resumed = make_trainer(make_adapted("qwen3", dtype="float16"), plan, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.step_losses == pytest.approx(losses[1][4:], rel=1e-2)
    assert resumed.accelerator.scaler.get_scale() == scale
