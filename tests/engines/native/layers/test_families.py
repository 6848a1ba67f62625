"""Every family's training step against peft's own, on tiny random models in float32.

Rows are longer than the windows; each runs alone through transformers, and end to end here.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from gguf_tiny import longrope_case, make_wrapper
from qlora_kit.engines.native.decoding.support import find_decoding_obstacle
from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.step_runner import StepRunner
from qlora_kit.engines.native.fast.support import find_obstacle

TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4,
               "attention_multiplier": 0.2}  # fmt: skip
LONGROPE = {**longrope_case(16), "head_dim": 16, "original_max_position_embeddings": 20}
LONGROPE["rope_parameters"]["original_max_position_embeddings"] = 20
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
STRETCHED = {**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

#: Configuration class, and what makes every part of the family matter.
CASES = {
    "arcee": ("ArceeConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.2, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.2, **TWO_KINDS}),
    "cwm": ("CwmConfig", {"rope_parameters": YARN, **TWO_KINDS}),
    "ernie4_5": ("Ernie4_5Config", {"use_bias": True}),
    "exaone4": ("Exaone4Config", TWO_KINDS),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 24, **CAPS}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **TWO_KINDS,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "glm": ("GlmConfig", {"attention_bias": True}),
    "glm4": ("Glm4Config", {}),
    "granite": ("GraniteConfig", {**MULTIPLIERS, "logits_scaling": 3.0, "attention_bias": True}),
    "helium": ("HeliumConfig", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "hunyuan-dynamic": (
        "HunYuanDenseV1Config",
        {"max_position_embeddings": 20, "rope_parameters": {**DYNAMIC, "alpha": 50.0}},
    ),
    "hyperclovax": (
        "HyperCLOVAXConfig",
        {**MULTIPLIERS, "logits_scaling": 0.3, "use_post_norm": True},
    ),
    "jais2": ("Jais2Config", {}),
    "llama-dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": 20, "rope_parameters": DYNAMIC},
    ),
    "ministral": ("MinistralConfig", TWO_KINDS),
    "ministral3": ("Ministral3Config", {"sliding_window": 8, "rope_parameters": STRETCHED}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "nemotron": ("NemotronConfig", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", TWO_KINDS),
    "phi3": ("Phi3Config", {"sliding_window": 8, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3Config", LONGROPE),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8,
                              "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 8,
                              "max_window_layers": 1}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmConfig", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 8}),
    "vaultgemma": ("VaultGemmaConfig", {"sliding_window": 8, **CAPS}),
}  # fmt: skip


def _make_config(case, **changes):
    import transformers

    class_name, own = CASES[case]
    return getattr(transformers, class_name)(
        **{
            "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, **own, **changes,
        }
    )  # fmt: skip


def _make_base(config):
    from transformers import AutoModelForCausalLM

    # Eager: transformers' other ways to attend leave soft caps out.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.copy_(torch.randn_like(parameter) * 0.7 / parameter.shape[-1] ** 0.5)
    return model


def _adapt(base, targets="all-linear", **fields):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **fields)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.train()


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
    model = _adapt(_make_base(_make_config(case)))
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
    model = _adapt(_make_base(_make_config(case)))
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
    model = _adapt(_make_base(_make_config(case)))
    fused_model = _make_fused(model)
    loss, _ = _run(model, fused_model)
    change(fused_model)
    assert abs(_run(model, fused_model)[0] / loss - 1) > 1e-5


@pytest.mark.parametrize("case", ["gemma3", "granite"])
def test_bfloat16_is_as_close_as_rounding_allows(case):
    base = _make_base(_make_config(case))
    model = _adapt(base.bfloat16())
    loss, reference = _reference(model)
    fast_loss, gradients = _run(model, _make_fused(model))
    assert fast_loss == pytest.approx(loss, rel=4e-3)
    assert _find_error(gradients, reference) < 0.08


def test_the_text_part_of_a_model_that_also_sees():
    config = make_wrapper("gemma3")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 96, 2
    text.layer_types, text.sliding_window = TWO_KINDS["layer_types"], 8
    model = _adapt(_make_base(config), targets=r".*language_model.*_proj")
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
    model = _adapt(_make_base(_make_config(case, **changes)))
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
    base = _make_base(_make_config(case, tie_word_embeddings=False))
    model = _adapt(base, targets=["q_proj", "down_proj"], modules_to_save=trained)
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
    model = _adapt(_make_base(_make_config("stablelm-parallel")))
    next(p for n, p in model.named_parameters() if "q_layernorm" in n).requires_grad_()
    assert "q_layernorm.norms.0.weight is trained" in find_obstacle(model, SETTINGS)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("gemma2", "does not compute gemma2"),
        ("mistral", "sliding window"),
        ("qwen2", "sliding window"),
        ("llama-dynamic", "'dynamic'"),
    ],
)
def test_the_decoder_leaves_what_it_does_not_compute_to_transformers(case, said):
    assert said in find_decoding_obstacle(_make_base(_make_config(case)))


@pytest.mark.parametrize("case", ["gemma2", "phi3", "granite"])
def test_the_curve_is_plain_trls(case, tmp_path, make_trainer, token_rows):
    """Through files and NF4, in batches padded to their longest row, with an evaluation."""
    from checkpoints import make_tokenizer, randomize
    from qlora_kit import attach_lora, load_quantized

    folder = tmp_path / case
    make_tokenizer(folder)
    _make_base(_make_config(case, vocab_size=384)).bfloat16().save_pretrained(folder)
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
