"""The fast forward and backward pass against peft's own, on the same quantized model."""

import logging

import pytest
import torch

from fast_gradients import assert_gradients_equal, compute_fast, compute_reference
from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.step_runner import StepRunner

ROWS = 6


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": "full"},
        {"checkpointing": "selective", "checkpointed_layers": 1, "micro_batch_tokens": 45},
        {"weights": "nf4", "loss_chunk_tokens": 7},
        {"weights": "cache", "attention": "mask"},
    ],
)
def test_gradients_equal_pefts(make_adapted, token_rows, kind, options):
    model = make_adapted(kind).model
    rows = token_rows[:ROWS]
    loss, reference, count = compute_reference(model, rows)
    fast_loss, gradients, _, fused_model = compute_fast(model, rows, count, **options)
    assert fused_model.is_fully_fused
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(gradients, reference, 1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_rslora": True},
        {"target_modules": ("q_proj", "v_proj", "down_proj")},
        {"rank_pattern": {"k_proj": 2, "up_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [1]},
        {"lora_dropout": 0.3, "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj")},
        {"use_dora": True},
        {"bias": "lora_only"},
    ],
    ids=lambda adapter: next(iter(adapter)),
)
def test_every_kind_of_adapter(make_adapted, token_rows, adapter):
    """What cannot be fused goes through peft's modules, and the result is the same."""
    model = make_adapted("llama", **adapter).model
    # Masks are drawn row by row in peft: of one row they are the same here.
    rows = token_rows[: 1 if "lora_dropout" in adapter else ROWS]
    torch.manual_seed(5)
    loss, reference, count = compute_reference(model, rows)
    torch.manual_seed(5)
    fast_loss, gradients, _, fused_model = compute_fast(model, rows, count)
    assert fused_model.is_fully_fused == ("use_dora" not in adapter)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(gradients, reference, 1e-5)


def test_recomputing_draws_the_same_dropout_masks(make_adapted, token_rows):
    results = []
    for checkpointing in ("none", "full"):
        model = make_adapted("llama", lora_dropout=0.3).model
        model.train()
        torch.manual_seed(7)
        _, gradients, _, _ = compute_fast(
            model, token_rows[:ROWS], 100, checkpointing=checkpointing
        )
        results.append(gradients)
    assert_gradients_equal(results[1], results[0], 1e-5)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, {"loss_chunk_tokens": 7}),
        ({"modules_to_save": ["lm_head", "norm", "q_norm", "input_layernorm"]}, {}),
        ({"target_modules": ("q_proj", "embed_tokens", "lm_head")}, {"loss_chunk_tokens": 7}),
    ],
    ids=["vocabulary", "norms", "adapted"],
)
def test_what_trains_beside_projections(make_adapted, token_rows, adapter, options):
    model = make_adapted("qwen3", **adapter).model
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    loss, reference, count = compute_reference(model, token_rows[:ROWS])
    fast_loss, gradients, _, _ = compute_fast(
        model, token_rows[:ROWS], count, micro_batch_tokens=45, **options
    )
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(gradients, reference, 1e-5)


@pytest.mark.parametrize("trained", ["both", "tokens"])
def test_a_tied_vocabulary_gets_the_gradients_of_both_its_ends(tmp_path, token_rows, trained):
    from peft import LoraConfig, get_peft_model

    from checkpoints import make_checkpoint
    from qlora_kit import load_quantized

    folder = make_checkpoint(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    base = load_quantized(folder, 256, "float32", engine="native").model
    settings = {
        "both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "tokens": {"trainable_token_indices": [token_rows[0]["input_ids"][-1], 7, 0]},
    }[trained]
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    loss, reference, count = compute_reference(model, token_rows[:ROWS])
    fast_loss, gradients, _, _ = compute_fast(
        model, token_rows[:ROWS], count, micro_batch_tokens=45
    )
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(gradients, reference, 1e-5)


@pytest.mark.parametrize(
    ("loading", "tolerance"),
    [({"load_in_4bit": False}, 1e-5), ({"load_in_4bit": False, "load_in_8bit": True}, 1e-5)],
    ids=["unquantized", "int8"],
)
def test_other_weights(make_adapted, token_rows, loading, tolerance):
    model = make_adapted("llama", **loading).model
    loss, reference, count = compute_reference(model, token_rows[:ROWS])
    fast_loss, gradients, _, fused_model = compute_fast(model, token_rows[:ROWS], count)
    assert fused_model.is_fully_fused is not loading.get("load_in_8bit", False)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert_gradients_equal(gradients, reference, tolerance)


def test_bfloat16_is_as_close_as_rounding_allows(make_adapted, token_rows):
    model = make_adapted("qwen3", dtype="bfloat16").model
    loss, reference, count = compute_reference(model, token_rows[:ROWS])
    fast_loss, gradients, _, _ = compute_fast(model, token_rows[:ROWS], count)
    assert fast_loss == pytest.approx(loss, rel=2e-3)
    assert_gradients_equal(gradients, reference, 0.05)


def test_statistics_equal_the_logits(make_adapted, token_rows):
    model = make_adapted("llama").model
    rows = token_rows[:ROWS]
    _, _, count = compute_reference(model, rows)
    model.zero_grad()
    *_, stats, _ = compute_fast(model, rows, count)
    hits = entropy = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1]
            labels = torch.tensor(row["labels"], device=model.device)[1:]
            kept = labels != -100
            hits += float((logits[kept].argmax(-1) == labels[kept]).sum())
            entropy += float(torch.distributions.Categorical(logits=logits[kept]).entropy().sum())
    assert stats.tolist() == pytest.approx([hits, entropy], rel=1e-5)


def test_compiled_equals_eager(make_adapted, token_rows):
    pytest.importorskip("torch._inductor")
    from qlora_kit.engines.native.layers.compilation import find_compile_obstacle

    model = make_adapted("qwen3").model
    obstacle = find_compile_obstacle(model.device)
    if obstacle:
        pytest.skip(f"torch.compile does not run here: {obstacle}")
    torch._dynamo.reset()
    eager_loss, eager, _, _ = compute_fast(model, token_rows[:ROWS], 100)
    # Other sizes must not mean other graphs: fail on the second compilation of a function.
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss, gradients, _, fused_model = compute_fast(model, token_rows[:ROWS], 100, compile=True)
        assert fused_model._layer_call.is_compiled
        _fast_again = StepRunner(fused_model)
        _fast_again.run_step(split_rows(token_rows[ROWS : 3 * ROWS]), 100)
    assert loss == pytest.approx(eager_loss, rel=1e-6)
    assert_gradients_equal(gradients, eager, 1e-5)


def test_without_a_compiler_it_runs_plainly_and_says_why(
    make_adapted, token_rows, caplog, monkeypatch
):
    from types import SimpleNamespace

    from torch._inductor import cpp_builder, exc

    from qlora_kit.engines.native.layers import compilation

    def refuse(*args, **kwargs):
        raise exc.InvalidCxxCompiler

    model = make_adapted("llama").model
    if model.device.type == "cuda":
        # Triton compiles its launchers as C.
        monkeypatch.setattr(compilation, "shutil", SimpleNamespace(which=lambda name: None))
        said = "triton needs a C compiler, and none was found"
    else:
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", refuse)
        said = "no C++ compiler was found"
    with caplog.at_level(logging.INFO):
        _, _, _, fused_model = compute_fast(model, token_rows[:ROWS], 100, compile="auto")
    assert not fused_model._layer_call.is_compiled
    assert said in caplog.text


def test_the_model_is_only_read(make_adapted, token_rows):
    adapted = make_adapted("llama")
    model = adapted.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    compute_fast(model, token_rows[:ROWS], 100)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert forwards == {
        name: module.__dict__.get("forward") for name, module in model.named_modules()
    }
