"""Whole runs through TRL's trainer: the same curve, logs, evaluation, checkpoints, resuming."""

import logging

import pytest
import torch

from forward import tolerance
from qlora_kit.errors import EngineError


def _parameters(adapted):
    return {
        name: parameter.detach().clone()
        for name, parameter in adapted.model.named_parameters()
        if parameter.requires_grad
    }


def _assert_close(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance, msg=name)


EAGER = {"compile": False}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "plan", [EAGER, {**EAGER, "micro_batch_tokens": 50, "checkpointing": "full"}]
)
def test_the_curve_is_plain_trls(make_adapted, make_trainer, kind, plan):
    plain, fast = make_adapted(kind), make_adapted(kind)
    reference = make_trainer(plain, False)
    reference.train()
    trainer = make_trainer(fast, plan)
    start = _parameters(fast)
    trainer.train()
    assert reference.fast_plan is None
    assert trainer.fast_plan is not None
    assert trainer.step_losses == pytest.approx(reference.step_losses, abs=2e-5)
    assert (trainer.tokens_seen, trainer.trained_tokens) == (
        reference.tokens_seen, reference.trained_tokens,
    )  # fmt: skip
    norms = [[h["grad_norm"] for h in t.state.log_history[:-1]] for t in (trainer, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    _assert_close(_parameters(fast), _parameters(plain), 2e-5)
    moved = max(float((v - start[k]).abs().max()) for k, v in _parameters(fast).items())
    assert moved > 1e-2


def test_a_trained_vocabulary_takes_the_fast_step(make_adapted, make_trainer):
    adapter = {"modules_to_save": ["lm_head", "embed_tokens"]}
    plain, fast = make_adapted(**adapter), make_adapted(**adapter)
    reference = make_trainer(plain, False, max_steps=4)
    reference.train()
    trainer = make_trainer(fast, {**EAGER, "enabled": True}, max_steps=4)
    trainer.train()
    assert trainer.step_losses == pytest.approx(reference.step_losses, abs=2e-5)
    _assert_close(_parameters(fast), _parameters(plain), 2e-5)
    # Their gradient in float32, and what the optimizer is given.
    assert trainer._runner.fused_model.memory_model().standing > 8 * 2 * 384 * 64


def test_packed_rows_train_like_their_examples(make_adapted, make_trainer, token_rows):
    """Neighbours in a packed row do not see each other, nor train across their border."""
    packed = [
        {
            "input_ids": [token for row in part for token in row["input_ids"]],
            "labels": [token for row in part for token in row["labels"]],
            "seq_lengths": [len(row["input_ids"]) for row in part],
        }
        for part in (token_rows[i : i + 4] for i in range(0, len(token_rows), 4))
    ]
    one_by_one, together = make_adapted(), make_adapted()
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    first = make_trainer(one_by_one, EAGER, **settings)
    first.train()
    second = make_trainer(
        together, EAGER, rows=packed, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, **settings,
    )  # fmt: skip
    second.train()
    assert second.step_losses == pytest.approx(first.step_losses, abs=1e-5)
    _assert_close(_parameters(together), _parameters(one_by_one), 1e-5)


def test_logs_and_evaluation(make_adapted, make_trainer):
    settings = {"with_eval": True, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 4,
                "prediction_loss_only": True}  # fmt: skip
    fast, plain = make_adapted(), make_adapted()
    trainer = make_trainer(fast, EAGER, **settings)
    trainer.train()
    reference = make_trainer(plain, False, **settings)
    reference.train()
    logged = trainer.state.log_history[0]
    assert {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"} <= set(logged)
    assert logged["num_tokens"] == sum(len(ids) for ids in _first_rows(trainer))
    losses = [
        [h["eval_loss"] for h in t.state.log_history if "eval_loss" in h]
        for t in (trainer, reference)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def _first_rows(trainer):
    loader = trainer.get_train_dataloader()
    return [
        row["input_ids"] for batch, _ in zip(loader, range(4), strict=False) for row in batch.rows
    ]


def test_resuming_continues_the_same_run(make_adapted, make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_adapted()
    make_trainer(whole, EAGER, **settings).train()
    resumed = make_adapted()
    trainer = make_trainer(resumed, EAGER, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert len(trainer.step_losses) == 3
    _assert_close(_parameters(resumed), _parameters(whole), tolerance(cpu=1e-7, gpu=1e-4))


def test_saved_adapters_are_pefts(make_adapted, make_trainer, tmp_path, token_rows):
    adapted = make_adapted()
    trainer = make_trainer(adapted, EAGER, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    live = {name.replace(".default", ""): value for name, value in _parameters(adapted).items()}
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], value.cpu()) for name, value in live.items())


def test_release_leaves_the_model_as_it_was(make_adapted, make_trainer, token_rows):
    adapted = make_adapted()
    model = adapted.model
    model.eval()
    ids = torch.tensor([token_rows[0]["input_ids"]], device=model.device)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    names = list(model.state_dict())
    trainer = make_trainer(adapted, EAGER, max_steps=2)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    trainer.train()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.release()
    model.eval()
    assert list(model.state_dict()) == names
    added = {
        name: set(module.__dict__) - before[name]
        for name, module in model.named_modules()
        if set(module.__dict__) - before[name] - {"model_tags", "warnings_issued"}
    }
    assert added == {}
    with torch.no_grad():
        # Trained: other numbers than before, from the same forward.
        assert not torch.equal(model(input_ids=ids).logits, expected)
    assert trainer.fast_plan is None


@pytest.mark.parametrize(
    ("adapter", "fields", "reason"),
    [
        ({}, {"loss_type": "dft"}, "loss_type='dft'"),
        ({}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({}, {"bf16": True}, "mixed precision"),
    ],
)
def test_what_is_not_covered_trains_through_trl_and_says_why(
    make_adapted, make_trainer, caplog, adapter, fields, reason
):
    is_cpu = not torch.cuda.is_available()
    if is_cpu and fields.get("bf16") and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bfloat16")
    adapted = make_adapted(**adapter)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(adapted, "auto", max_steps=1, **fields)
    assert trainer.fast_plan is None
    assert reason in caplog.text
    trainer.train()
    assert len(trainer.step_losses) == 1


def test_insisting_on_what_is_not_covered_is_an_error(make_adapted, make_trainer):
    with pytest.raises(EngineError, match="neftune_noise_alpha=5"):
        make_trainer(make_adapted(), {"enabled": True}, neftune_noise_alpha=5.0)


def test_checkpointing_follows_the_user_unless_left_open(make_adapted, make_trainer):
    pinned = make_trainer(make_adapted(), EAGER, max_steps=1, gradient_checkpointing=True)
    pinned.train()
    assert pinned.fast_plan.checkpointing == "full"
    left_open = make_trainer(
        make_adapted(), EAGER, max_steps=1, gradient_checkpointing=True, chooses=True
    )
    left_open.train()
    assert left_open.fast_plan.checkpointing == "none"


@pytest.mark.parametrize("is_filtered", [True, False])
def test_losses_that_are_no_number_are_logged_as_asked(make_adapted, make_trainer, is_filtered):
    from transformers import TrainerCallback

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer = make_trainer(
        make_adapted(), EAGER, max_steps=2, logging_nan_inf_filter=is_filtered, logging_steps=2
    )
    trainer.add_callback(Breaks())
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert torch.isfinite(torch.tensor(logged)) == is_filtered
    # The record holds what was computed either way.
    assert torch.isfinite(torch.tensor(trainer.step_losses)).tolist() == [True, False]


def test_the_devices_cache_is_emptied_as_often_as_asked(make_adapted, make_trainer, monkeypatch):
    from qlora_kit.engines.native.fast import fast_step as steps

    emptied = []
    monkeypatch.setattr(steps, "clear_device_cache", lambda: emptied.append(1))
    make_trainer(make_adapted(), EAGER, max_steps=4, torch_empty_cache_steps=2).train()
    assert len(emptied) == 2
    make_trainer(make_adapted(), EAGER, max_steps=2).train()
    assert len(emptied) == 2
