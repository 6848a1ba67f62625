"""Attaching adapters: every parameter of the classic script, presets, and what is refused."""

import pytest

from checkpoints import make_checkpoint
from forward import logits_of
from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized, train_sft
from qlora_kit.config import DEFAULT_TARGET_MODULES
from qlora_kit.errors import ConfigError


@pytest.fixture
def base(tiny_llama):
    return load_quantized(tiny_llama, dtype="float32")


@pytest.fixture
def base16(tiny_llama):
    return load_quantized(tiny_llama, dtype="float32", load_in_4bit=False)


def _adapted_names(model):
    return {
        name.split(".")[-1]
        for name, module in model.model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def test_the_classic_scripts_call_works_by_position_and_name(base, caplog):
    import torch

    before = logits_of(base.model)
    with caplog.at_level("INFO"):
        model = attach_lora(
            base,
            r=16,
            target_modules=[
                "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
            ],
            lora_alpha=16,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth",
            random_state=3407,
            use_rslora=False,
            loftq_config=None,
        )  # fmt: skip
    assert _adapted_names(model) == set(DEFAULT_TARGET_MODULES)
    assert f"{model.trainable_parameters:,} of {model.total_parameters:,}" in caplog.text
    trained = [p for p in model.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == model.trainable_parameters
    assert {p.dtype for p in trained} == {torch.float32}
    # B starts at zero, so a fresh adapter changes nothing.
    assert torch.equal(logits_of(model.model), before)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("all-linear", set(DEFAULT_TARGET_MODULES)),
        ("v_proj", {"v_proj"}),
        (["layers.0.self_attn.q_proj"], {"q_proj"}),
    ],
)
def test_presets_and_names_choose_modules(base, preset, expected):
    assert _adapted_names(attach_lora(base, r=2, target_modules=preset)) == expected


@pytest.mark.parametrize(
    "targets", [["q_porj"], "attn", ["q_proj", "nope"], [], [3], None, 3, ["mlp.q_proj"]]
)
def test_unknown_modules_raise_and_list_what_exists(base, targets):
    with pytest.raises(ConfigError, match="gate_proj"):
        attach_lora(base, target_modules=targets)


def test_near_names_are_suggested(base):
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        attach_lora(base, target_modules=["q_porj"])
    with pytest.raises(ConfigError, match="lm_head"):
        attach_lora(base, modules_to_save=["lm_haed"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 0}, {"r": 2.5}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1},
        {"bias": "some"}, {"use_gradient_checkpointing": "yes"}, {"lora_alpha": "16"},
        {"lora_dropout": None}, {"random_state": "x"}, {"init_lora_weights": "pisa"},
        {"init_lora_weights": "eva"}, {"layers_to_transform": [0, 99]},
        {"layers_to_transform": 2}, {"rank_pattern": {"nope": 3}}, {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"nope": 3}}, {"loftq_config": "x"}, {"target_parameters": "experts"},
        {"target_parameters": []}, {"target_parameters": 5},
        {"target_parameters": ["q_proj.weight"]},
    ],
)  # fmt: skip
def test_impossible_values_are_refused(base, arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=name if name != "r" else "rank"):
        attach_lora(base, **arguments)


def test_a_second_adapter_is_refused(base):
    model = attach_lora(base, r=2)
    with pytest.raises(ConfigError, match="already has an adapter"):
        attach_lora(model, r=4)
    with pytest.raises(ConfigError, match="load_quantized"):
        attach_lora("a string")


def test_the_seed_decides_the_start_and_leaves_torchs_generator_alone(tiny_llama):
    import torch

    def start(seed):
        model = attach_lora(load_quantized(tiny_llama), r=4, random_state=seed)
        return next(p for n, p in model.model.named_parameters() if "lora_A" in n).detach()

    torch.manual_seed(1)
    first = start(5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, start(5))
    assert not torch.equal(first, start(6))


def test_rslora_scales_by_the_root_of_the_rank(base):
    model = attach_lora(base, r=16, lora_alpha=16, use_rslora=True)
    module = next(m for m in model.model.modules() if hasattr(m, "lora_A"))
    assert module.scaling["default"] == pytest.approx(4.0)


@pytest.mark.parametrize("quantized", [True, False])
def test_dora_starts_at_the_base_and_trains_magnitudes(tiny_llama, quantized):
    import torch

    loaded = load_quantized(tiny_llama, dtype="float32", load_in_4bit=quantized)
    before = logits_of(loaded.model)
    model = attach_lora(loaded, r=4, use_dora=True)
    assert any("magnitude" in n for n, p in model.model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(logits_of(model.model), before, atol=2e-5, rtol=1e-4)


def test_pissa_starts_at_the_base_with_principal_directions(base16):
    import torch

    before = logits_of(base16.model)
    model = attach_lora(base16, r=8, init_lora_weights="pissa")
    torch.testing.assert_close(logits_of(model.model), before, atol=1e-4, rtol=1e-4)
    assert any(p.abs().max() > 0 for n, p in model.model.named_parameters() if "lora_B" in n), (
        "PiSSA starts with B away from zero"
    )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_base_say_the_way_out_of_a_quantized_one(base, start):
    with pytest.raises(ConfigError, match="load_in_4bit=False"):
        attach_lora(base, init_lora_weights=start)


@pytest.mark.parametrize("arguments", [{"loftq_config": {"loftq_bits": 4}},
                                       {"init_lora_weights": "loftq"}])  # fmt: skip
@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_brings_a_four_bit_base_nearer_to_the_original(tiny_llama, arguments, use_rslora):
    exact = load_quantized(tiny_llama, dtype="float32", load_in_4bit=False)
    original = logits_of(exact.model)
    loaded = load_quantized(tiny_llama, dtype="float32")
    quantized_error = (logits_of(loaded.model) - original).norm()
    model = attach_lora(loaded, r=32, lora_alpha=8, use_rslora=use_rslora, **arguments)
    assert (logits_of(model.model) - original).norm() < 0.8 * quantized_error


def test_loftq_needs_a_four_bit_base_with_an_original(base16, tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match="load_in_4bit=True"):
        attach_lora(base16, loftq_config={"loftq_bits": 4})
    with pytest.raises(ConfigError, match="loftq_iter"):
        attach_lora(load_quantized(tiny_llama), loftq_config={"loftq_bits": 4, "loftq_iter": 5})
    stored = load_quantized(tiny_llama)
    stored.model.save_pretrained(tmp_path / "nf4")
    stored.tokenizer.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ConfigError, match="16-bit"):
        attach_lora(load_quantized(tmp_path / "nf4"), loftq_config={"loftq_bits": 4})


def test_saved_modules_layers_and_patterns_reach_peft(base16):
    model = attach_lora(
        base16,
        r=4,
        modules_to_save=["lm_head"],
        layers_to_transform=[1],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 7},
    )
    trained = {n for n, p in model.model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    assert not any("layers.0." in name for name in trained)
    shapes = {n: p.shape for n, p in model.model.named_parameters() if "lora_A" in n}
    assert {s[0] for n, s in shapes.items() if "q_proj" in n} == {2}
    assert {s[0] for n, s in shapes.items() if "v_proj" in n} == {4}


def test_what_the_classic_script_passes_besides_is_taken(base):
    """Every default of ``FastLanguageModel.get_peft_model``, and ``FastModel``'s switches."""
    model = attach_lora(
        base,
        max_seq_length=base.max_seq_length, layers_to_transform=None, layers_pattern=None,
        finetune_last_n_layers=None, modules_to_save=None, init_lora_weights=True,
        loftq_config={}, temporary_location="_saved_buffers", qat_scheme=None,
        target_parameters=None, ensure_weight_tying=None, offload_layers=None,
        checkpoint_skip_layers=0, finetune_vision_layers=False, finetune_language_layers=True,
        finetune_attention_modules=True, finetune_mlp_modules=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    assert _adapted_names(model) == set(DEFAULT_TARGET_MODULES)


@pytest.mark.parametrize(
    ("argument", "value", "advice"),
    [
        ("max_seq_length", 64, "loaded for 2048. Give load_quantized another"),
        ("finetune_mlp_modules", False, "target_modules='attention'"),
        ("finetune_last_n_layers", 2, "layers_to_transform"),
        ("seed", 1, "random_state"),
        ("lora_alfa", 16, "Did you mean 'lora_alpha'"),
        ("entirely_else", 16, "It has: model, r, "),
    ],
)
def test_what_is_not_taken_says_where_it_belongs(base, argument, value, advice):
    with pytest.raises(ConfigError) as caught:
        attach_lora(base, **{argument: value})
    assert advice in str(caught.value)
    assert argument in str(caught.value)
    # Nothing was attached to the base.
    assert not any(hasattr(module, "lora_A") for module in base.model.modules())


def test_experts_that_no_module_holds_are_named_with_the_way_round_them(tmp_path):
    folder = make_checkpoint(tmp_path / "moe", "qwen3_moe")
    loaded = load_quantized(folder, dtype="float32", load_in_4bit=False)
    for arguments in ({}, {"target_modules": "mlp"}):
        with pytest.raises(ConfigError, match=r"lie together in .*target_parameters='experts'"):
            attach_lora(loaded, **arguments)
    model = attach_lora(loaded, target_modules="attention")
    assert _adapted_names(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.filterwarnings("error:The following rank_pattern")
def test_experts_take_adapters_by_the_names_of_their_parameters(tmp_path):
    folder = make_checkpoint(tmp_path / "moe", "qwen3_moe")
    loaded = load_quantized(folder, dtype="float32", load_in_4bit=False)
    for arguments, told in (
        ({"target_parameters": ["mlp.experts.gate_up_prj"]}, "Did you mean 'mlp.experts.gate_up"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 does not go with"),
        ({"use_dora": True}, "use_dora=True does not go with"),
        ({"init_lora_weights": "orthogonal"}, "True or 'gaussian'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config=.* does not go with"),
        ({"layers_to_transform": 1}, r"layers\.1\.mlp\.experts\.gate_up_proj"),
        ({"rank_pattern": {"nope": 2}}, "mlp.experts.down_proj"),
        ({"r": 65, "target_modules": []}, "largest adapted matrix"),
    ):
        with pytest.raises(ConfigError, match=told):
            attach_lora(loaded, **{"target_parameters": "experts", **arguments})
    asked = {"r": 4, "target_parameters": "experts", "rank_pattern": {"down_proj": 2}}
    model = attach_lora(loaded, **asked)
    assert attach_lora(model, **asked) is model
    with pytest.raises(ConfigError, match="target_parameters=None"):
        attach_lora(model, **{**asked, "target_parameters": None})
    shapes = {
        name.removeprefix("base_model.model.model.layers.1."): tuple(parameter.shape)
        for name, parameter in model.model.named_parameters()
        if parameter.requires_grad and "layers.1.mlp" in name
    }
    # Four experts of ranks 4 and 2.
    assert shapes == {
        "mlp.experts.base_layer.lora_A.default.weight": (16, 64),
        "mlp.experts.base_layer.lora_B.default.weight": (64, 16),
        "mlp.experts.lora_A.default.weight": (8, 32),
        "mlp.experts.lora_B.default.weight": (64, 8),
    }


def test_a_base_that_carries_an_adapter_gets_no_second_one(tiny_llama, tmp_path):
    """A notebook's cell run again, with two variable names: nothing of the first one changes."""
    loaded = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False)
    adapted = attach_lora(loaded, r=4)
    with pytest.raises(ConfigError, match="carries an adapter already"):
        attach_lora(loaded, r=4)
    assert export_model(adapted, "lora", tmp_path / "lora").verification.passed


@pytest.mark.parametrize(
    ("target", "parameter"), [("embed_tokens", "lora_embedding_B"), ("lm_head", "lora_B")]
)
def test_adapted_vocabularies_train(tiny_llama, tmp_path, alpaca_rows, target, parameter):
    """Both in the fast step; TRL's own would leave the head as it is, and refuses it."""
    loaded = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False)
    model = attach_lora(loaded, r=4, target_modules=["q_proj", target])
    rows = AlpacaFormatter(model.tokenizer).load(alpaca_rows)
    settings = {"output_dir": tmp_path / "run", "max_steps": 2, "learning_rate": 1e-2,
                "warmup_steps": 0, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    if target == "lm_head":
        with pytest.raises(ConfigError, match="adapter to `lm_head` is not supported"):
            train_sft(model, rows, plan=False, **settings)
    result = train_sft(model, rows, **settings)
    assert "TRL" not in result.plan
    trained = dict(model.model.named_parameters())
    (up,) = [one for name, one in trained.items() if target in name and parameter in name]
    assert up.abs().sum() > 0
    artifact = export_model(model, "merged_16bit", tmp_path / "merged", verify="full")
    assert artifact.verification.passed
