"""Models with experts: stacks and whole layers against peft's and transformers' own."""

import pytest
import torch

from checkpoints import make_checkpoint
from fast_gradients import (
    assert_gradients_equal,
    compute_fast,
    compute_reference,
    take_gradients,
)
from qlora_kit.engines.native.layers.experts import (
    ExpertStack,
    apply_experts,
    gather_experts,
    route,
)

_STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _activate(both):
    gate, up = both.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("is_adapted", [True, False])
def test_experts_are_what_each_token_chose(is_adapted):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, experts, hidden, inner, rank = 23, 5, 8, 6, 4
    # The last expert gets no token.
    chosen = torch.stack([torch.randperm(experts - 1, generator=generator)[:2] for _ in range(23)])
    x, weights = draw(tokens, hidden).requires_grad_(), draw(tokens, 2).softmax(1).requires_grad_()
    stacks = [draw(experts, 2 * inner, hidden), draw(experts, hidden, inner)]
    adapters = [[None, None]] * 2
    if is_adapted:
        adapters = [
            [draw(experts, rank, stack.shape[2]).requires_grad_(),
             draw(experts, stack.shape[1], rank).requires_grad_()]
            for stack in stacks
        ]  # fmt: skip
    first, second = (
        ExpertStack(stack, *pair) for stack, pair in zip(stacks, adapters, strict=True)
    )
    out = apply_experts(x, weights, route(chosen, experts), first, second, _activate)
    whole = [
        stack if down is None else stack + up @ down
        for stack, (down, up) in zip(stacks, adapters, strict=True)
    ]
    expected = torch.stack([
        sum(
            weights[token, choice]
            * (_activate(x[token][None] @ whole[0][expert].T) @ whole[1][expert].T)[0]
            for choice, expert in enumerate(row)
        )
        for token, row in enumerate(chosen.tolist())
    ])  # fmt: skip
    torch.testing.assert_close(out, expected)
    gathered = gather_experts(x, weights, chosen, first, second, _activate)
    torch.testing.assert_close(gathered, expected)
    leaves = [x, weights, *(one for pair in adapters for one in pair if one is not None)]
    grad = draw(tokens, hidden)
    for found, right in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, right)


@pytest.fixture
def make_moe(tmp_path):
    """A tiny model with experts and peft's adapters, as the native engine holds it."""

    def make(kind="qwen3_moe", *, load_in_4bit=True, adapter=None, **overrides):
        from peft import LoraConfig, get_peft_model

        from qlora_kit import load_quantized

        folder = tmp_path / kind
        if not folder.exists():
            make_checkpoint(folder, kind, **overrides)
        base = load_quantized(folder, 256, "float32", load_in_4bit, engine="native").model
        torch.manual_seed(0)
        config = {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "o_proj"],
            **(adapter or {}),
        }
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return model

    return make


@pytest.mark.parametrize(
    ("kind", "adapter", "options"),
    [
        ("qwen3_moe", {"target_parameters": _STACKS}, {}),
        ("qwen3_moe", {"target_parameters": _STACKS[1:]}, {"checkpointing": "full"}),
        ("mixtral", {"modules_to_save": ["gate"]}, {"micro_batch_tokens": 45}),
        ("qwen2_moe", {"target_modules": "all-linear"}, {}),
        ("olmoe", {"target_parameters": _STACKS[:1]}, {}),
        ("granitemoe", {}, {}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["gate.weight"]}, {}),
    ],
    ids=["stacks", "one stack", "mixtral", "shared", "olmoe", "granite", "router"],
)
def test_gradients_equal_pefts(make_moe, token_rows, kind, adapter, options):
    model = make_moe(kind, adapter=adapter)
    rows = token_rows[:6]
    loss, reference, count = compute_reference(model, rows)
    fast_loss, gradients, _, fused_model = compute_fast(model, rows, count, **options)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(gradients, reference, 1e-5)
    assert not fused_model.is_capturable


def test_routers_are_balanced_as_transformers_does(make_moe, token_rows):
    model = make_moe(adapter={"target_parameters": _STACKS})
    base = model.get_base_model()
    base.config.output_router_logits = True
    base.config.router_aux_loss_coef = base.router_aux_loss_coef = 0.5
    row = max(token_rows[:6], key=lambda one: len(one["input_ids"]))
    ids, labels = (
        torch.tensor([row[name]], device=base.device) for name in ("input_ids", "labels")
    )
    model.train()
    found = model(input_ids=ids, labels=labels)
    found.loss.backward()
    reference = take_gradients(model)
    count = int((labels[:, 1:] != -100).sum())
    fast_loss, gradients, _, _ = compute_fast(model, [row], count)
    assert float(found.aux_loss.detach()) > 0.5
    assert fast_loss == pytest.approx(float(found.loss.detach()), rel=1e-6)
    assert_gradients_equal(gradients, reference, 1e-5)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_experts_that_are_not_quantized_are_named_at_loading(tmp_path, caplog, load_in_4bit):
    from qlora_kit import load_quantized

    folder = make_checkpoint(tmp_path / "base", "qwen3_moe")
    load_quantized(folder, 64, "float32", load_in_4bit, engine="native")
    assert ("weights of the experts stay in float32" in caplog.text) is load_in_4bit


def test_the_curve_is_plain_trls(tmp_path, make_trainer):
    """TRL adds the routers' balance to the loss of every model that has one."""
    from checkpoints import randomize
    from qlora_kit import attach_lora, load_quantized

    folder = make_checkpoint(tmp_path / "base", "qwen3_moe")
    settings = {"per_device_train_batch_size": 8, "max_steps": 3, "router_aux_loss_coef": 0.1}
    losses = []
    for plan in (False, {"compile": False, "enabled": True}):
        loaded = load_quantized(folder, 256, "float32", engine="native")
        adapted = randomize(attach_lora(loaded, r=4, target_modules="attention"))
        trainer = make_trainer(adapted, plan, with_eval=True, **settings, eval_steps=2,
                               gradient_accumulation_steps=1, eval_strategy="steps")  # fmt: skip
        trainer.train()
        evaluated = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
        losses.append((trainer.step_losses, evaluated))
    (expected, evaluated), (found, found_evaluated) = losses
    assert found == pytest.approx(expected, abs=2e-5)
    assert found_evaluated == pytest.approx(evaluated, rel=1e-2)


def test_adapted_experts_are_trained_resumed_merged_and_loaded_again(tmp_path, alpaca_rows, caplog):
    from exported import load_plain
    from forward import logits_of
    from qlora_kit import attach_lora, export_model, load_quantized, train_sft
    from qlora_kit.errors import ConfigError, UnsupportedModelError

    caplog.set_level("INFO")
    folder = make_checkpoint(tmp_path / "base", "qwen3_moe", norm_topk_prob=True)

    def load():
        return load_quantized(folder, 256, "float32", load_in_4bit=False, engine="native")

    def train(model, name, **settings):
        settings = {"max_steps": 2, "save_steps": 1, "warmup_steps": 0, **settings}
        return train_sft(model, alpaca_rows, output_dir=tmp_path / name, learning_rate=1e-2,
                         per_device_train_batch_size=2, report_to="none", **settings)  # fmt: skip

    model = attach_lora(load(), r=4, target_parameters="experts")
    train(model, "whole")
    assert "Training step: micro-batches" in caplog.text
    resumed = attach_lora(load(), r=4, target_parameters="experts")
    train(resumed, "resumed", max_steps=1)
    other = attach_lora(load(), r=4, target_modules="attention")
    with pytest.raises(ConfigError, match="target_parameters"):
        train(other, "resumed", resume_from_checkpoint=True)
    train(resumed, "resumed", resume_from_checkpoint=True)
    right = logits_of(model.model)
    torch.testing.assert_close(logits_of(resumed.model), right)
    made = export_model(model, ["merged_16bit", "lora", "gguf"], tmp_path / "out")
    again = load_plain(made["merged_16bit"].path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), right, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        logits_of(load_quantized(made["lora"].path, 256, "float32", False, engine="native").model),
        right,
    )
    with pytest.raises(UnsupportedModelError, match=r"Adapters of experts \(target_parameters\)"):
        export_model(model, "gguf-lora", tmp_path / "alone")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_one_kernel_has_the_loops_numbers():
    """bfloat16 on CUDA goes through a grouped product; float32 through a loop over experts."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, hidden, inner, rank = 37, 6, 32, 16, 8
    chosen = torch.stack([
        torch.randperm(experts - 1, generator=generator)[:2] for _ in range(tokens)
    ]).cuda()  # fmt: skip
    shapes = [(tokens, hidden), (tokens, 2), (experts, rank, hidden), (experts, 2 * inner, rank),
              (experts, rank, inner), (experts, hidden, rank), (experts, 2 * inner, hidden),
              (experts, hidden, inner), (tokens, hidden)]  # fmt: skip
    drawn = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        *leaves, first, second, grad = (one.to("cuda", dtype) for one in drawn)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = apply_experts(
            leaves[0], leaves[1], route(chosen, experts),
            ExpertStack(first, *leaves[2:4]), ExpertStack(second, *leaves[4:6]), _activate,
        )  # fmt: skip
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for exact, found in zip(*results, strict=True):
        assert (found.float() - exact).norm() / exact.norm() < 0.03
