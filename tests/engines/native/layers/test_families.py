"""Every family's training step against peft's own, on tiny random models in float32.

Rows are longer than the windows; each runs alone through transformers, and end to end here.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from family_cases import CASES, TWO_KINDS, adapt, make_base, make_config
from gguf_tiny import make_wrapper
from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.step_runner import StepRunner
from qlora_kit.engines.native.fast.support import find_obstacle


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _draw_rows():
    source = random.Random(0)
    rows = []
    for length in (30, 5, 21):
        ids = [source.randint(5, 299) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:]})
    return rows


ROWS = _draw_rows()
TRAINED = sum(len(row["labels"]) - 2 for row in ROWS)


def _reference(model):
    total = 0.0
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (total / TRAINED).backward()
    return float(total.detach()) / TRAINED, _take_gradients(model)


def _take_gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def _make_fused(model, **options):
    plan = FastPlan(**{"compile": False, **options})
    fused_model = FusedModel(model, plan)
    fused_model.apply(
        resolve_plan(
            plan, fused_model.memory_model(), device_type="cpu", free_bytes=2**33, step_tokens=60,
            longest=30, is_quantized=False, supports_graphs=False,
        )
    )  # fmt: skip
    return fused_model


def _run(model, fused_model):
    loss, _ = StepRunner(fused_model).run_step(split_rows(ROWS), TRAINED)
    return float(loss), _take_gradients(model)


def _find_error(gradients, reference):
    assert gradients.keys() == reference.keys()
    assert all(expected.norm() > 0 for expected in reference.values())
    return max(
        float((gradients[name] - expected).norm() / expected.norm())
        for name, expected in reference.items()
    )


SETTINGS = SimpleNamespace(
    deepspeed=None, fsdp=None, loss_type=None, optim="adamw_torch", bf16=False, fp16=False
)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_pefts(case):
    model = adapt(make_base(make_config(case)))
    assert find_obstacle(model, SETTINGS) is None
    loss, reference = _reference(model)
    fused_model = _make_fused(model)
    assert fused_model.is_fully_fused
    fast_loss, gradients = _run(model, fused_model)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert _find_error(gradients, reference) < 1e-5


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "cohere2"])
@pytest.mark.parametrize(
    "options", [{"attention": "mask"}, {"checkpointing": "full", "micro_batch_tokens": 35}]
)
def test_other_plans_compute_the_same(case, options):
    model = adapt(make_base(make_config(case)))
    loss, reference = _reference(model)
    fast_loss, gradients = _run(model, _make_fused(model, **options))
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert _find_error(gradients, reference) < 1e-5


def _without(**fields):
    def change(fused_model):
        fused_model.shape = fused_model.shape._replace(**fields)

    return change


def _without_window(fused_model):
    positions = fused_model._positions
    positions.windows = [torch.zeros_like(window) for window in positions.windows]


def _rotate_everywhere(fused_model):
    keys = fused_model._positions.keys
    fused_model._positions.keys = [next(key for key in keys if key is not None)] * len(keys)


def _without_logit_scale(fused_model):
    fused_model._vocabulary._scale = 1.0


def _without_logit_cap(fused_model):
    fused_model._vocabulary._softcap = 0.0


def _without_stretch(fused_model):
    fused_model._positions.stretch = lambda *_: None


def _all_short(fused_model):
    by_length = fused_model._positions._by_length
    fused_model._positions._by_length = lambda lengths: by_length(torch.ones_like(lengths))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("gemma2", _without(softcap=0.0)),
        ("gemma2", _without(scale=0.25)),
        ("gemma2", _without_window),
        ("gemma2", _without_logit_cap),
        ("gemma3", _without_window),
        ("gemma3", _rotate_everywhere),
        ("mistral", _without_window),
        ("granite", _without(residual=1.0)),
        ("granite", _without_logit_scale),
        ("smollm3", _rotate_everywhere),
        ("cohere2", _rotate_everywhere),
        ("cohere2", _without(turns_pairs=False)),
        ("hunyuan", _without(head_norms_turned=False)),
        ("ministral3", _without_stretch),
        ("phi3-longrope", _all_short),
        ("llama-dynamic", _all_short),
    ],
)
def test_the_comparison_notices_what_a_family_adds(case, change):
    """Each part changes the loss of these rows by far more than the comparison allows."""
    model = adapt(make_base(make_config(case)))
    fused_model = _make_fused(model)
    loss, _ = _run(model, fused_model)
    change(fused_model)
    assert abs(_run(model, fused_model)[0] / loss - 1) > 1e-5


@pytest.mark.parametrize("case", ["gemma3", "granite"])
def test_bfloat16_is_as_close_as_rounding_allows(case):
    base = make_base(make_config(case))
    model = adapt(base.bfloat16())
    loss, reference = _reference(model)
    fast_loss, gradients = _run(model, _make_fused(model))
    assert fast_loss == pytest.approx(loss, rel=4e-3)
    assert _find_error(gradients, reference) < 0.08


def test_the_text_part_of_a_model_that_also_sees():
    config = make_wrapper("gemma3")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 96, 2
    text.layer_types, text.sliding_window = TWO_KINDS["layer_types"], 8
    model = adapt(make_base(config), targets=r".*language_model.*_proj")
    assert find_obstacle(model, SETTINGS) is None
    loss, reference = _reference(model)
    fast_loss, gradients = _run(model, _make_fused(model))
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert _find_error(gradients, reference) < 1e-5


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ("starcoder2", {"embedding_dropout": 0.1}, "embedding_dropout=0.1"),
        ("gemma3", {"use_bidirectional_attention": True}, "later ones"),
        ("gemma", {"hidden_act": "tanh"}, "the activation is tanh"),
    ],
)
def test_what_is_not_computed_is_said(case, changes, said):
    model = adapt(make_base(make_config(case, **changes)))
    assert said in find_obstacle(model, SETTINGS)


@pytest.mark.parametrize(
    ("case", "trained"),
    [
        ("gemma3", ["post_feedforward_layernorm", "q_norm"]),
        ("nemotron", ["input_layernorm"]),
        ("gemma2", ["embed_tokens", "lm_head"]),
        ("granite", ["embed_tokens", "lm_head"]),
    ],
)
def test_what_trains_besides_adapters(case, trained):
    """Norms whose weight is stored less one, scaled embeddings, scaled and capped heads."""
    base = make_base(make_config(case, tie_word_embeddings=False))
    model = adapt(base, targets=["q_proj", "down_proj"], modules_to_save=trained)
    assert find_obstacle(model, SETTINGS) is None
    loss, reference = _reference(model)
    fused_model = _make_fused(model)
    fast_loss, gradients = _run(model, fused_model)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert _find_error(gradients, reference) < 1e-5
    # What is read once must not be what trains.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    moved, _ = _reference(model)
    assert abs(moved - loss) > 1e-3
    assert _run(model, fused_model)[0] == pytest.approx(moved, rel=1e-6)


def test_a_trained_norm_per_head_is_left_to_trl():
    model = adapt(make_base(make_config("stablelm-parallel")))
    next(p for n, p in model.named_parameters() if "q_layernorm" in n).requires_grad_()
    assert "q_layernorm.norms.0.weight is trained" in find_obstacle(model, SETTINGS)


@pytest.mark.parametrize("case", ["gemma2", "phi3", "granite"])
def test_the_curve_is_plain_trls(case, tmp_path, make_trainer, token_rows):
    """Through files and NF4, in batches padded to their longest row, with an evaluation."""
    from checkpoints import make_tokenizer, randomize
    from qlora_kit import attach_lora, load_quantized

    folder = tmp_path / case
    make_tokenizer(folder)
    make_base(make_config(case, vocab_size=384)).bfloat16().save_pretrained(folder)
    losses = []
    for plan in ({"compile": False, "enabled": True}, False):
        loaded = load_quantized(folder, 256, "float32", engine="native")
        adapted = attach_lora(
            loaded, r=4, target_modules="all-linear", use_gradient_checkpointing=False
        )
        trainer = make_trainer(
            randomize(adapted, std=0.05), plan, max_steps=3, with_eval=True,
            eval_strategy="steps", eval_steps=3, prediction_loss_only=True,
        )  # fmt: skip
        trainer.train()
        evaluated = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
        losses.append([*trainer.step_losses, *evaluated])
        trainer.release()
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
