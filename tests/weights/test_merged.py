"""Merging: every kind of adapter gives the live model's logits, or is refused by name."""

import math

import pytest

from checkpoints import make_checkpoint, randomize
from forward import logits_of
from qlora_kit import attach_lora, load_quantized
from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.weights.merged import MergedWeights, choose_merge_base


def rebuild(merged, live):
    """A fresh float32 model that holds exactly the merged tensors."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(live.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in merged.config_updates().items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: merged.load(name).float() for name in merged.names()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    model.tie_weights()
    return model


def assert_merges(model, base="dequantized", atol=2e-5):
    """The merged tensors give the live logits, and the adapter matters."""
    import torch

    live = logits_of(model.model)
    with model.model.disable_adapter():
        assert (logits_of(model.model) - live).abs().max() > 100 * atol
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    with MergedWeights(model, base) as merged:
        rebuilt = rebuild(merged, model.model.get_base_model())
        assert all(merged.load(n).shape == merged.shape(n) for n in merged.names())
        assert all(merged.load(n).dtype == merged.dtype_of(n) for n in merged.names())
    torch.testing.assert_close(logits_of(rebuilt), live, atol=atol, rtol=1e-4)
    after = dict(model.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_dora": True, "use_rslora": True},
    "gaussian, other alpha": {"init_lora_weights": "gaussian", "lora_alpha": 7.5},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5, "up_proj": 40}},
    "some layers": {"layers_to_transform": [1]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms in full": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_merges_into_a_float_base(request, kind, options):
    folder = request.getfixturevalue(f"tiny_{kind}")
    base = load_quantized(folder, 64, "float32", load_in_4bit=False, engine="native")
    assert_merges(randomize(attach_lora(base, r=4, **options)), "original")


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_merges_into_a_4bit_base(tiny_qwen3, options):
    base = load_quantized(tiny_qwen3, 64, "float32", engine="native")
    assert_merges(randomize(attach_lora(base, r=4, **options)))


def test_an_adapter_merges_into_an_8bit_base_before_and_after_it_ran(tiny_llama):
    import torch

    base = load_quantized(tiny_llama, 64, "float32", load_in_8bit=True, engine="native")
    model = randomize(attach_lora(base, r=4))
    with MergedWeights(model, "dequantized") as merged:
        before = {name: merged.load(name) for name in merged.names()}
        rebuilt = rebuild(merged, model.model.get_base_model())
    live = logits_of(model.model)
    # LLM.int8() rounds activations too, so logits agree only that far.
    assert (logits_of(rebuilt) - live).abs().max() < 0.02 * live.abs().max()
    with MergedWeights(model, "dequantized") as merged:
        assert all(torch.equal(before[name], merged.load(name)) for name in merged.names())


def test_pissa_merges_into_the_base_it_changed(tiny_llama):
    base = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    model = attach_lora(base, r=4, init_lora_weights="pissa")
    assert_merges(randomize(model), "original")


def test_bias_adapters_merge(tmp_path):
    folder = make_checkpoint(tmp_path / "biased", "llama", attention_bias=True, mlp_bias=True)
    for bias in ("all", "lora_only"):
        base = load_quantized(folder, 64, "float32", load_in_4bit=False, engine="native")
        assert_merges(randomize(attach_lora(base, r=4, bias=bias)))


def test_lora_bias_merges_where_there_is_a_bias_and_is_refused_where_not(tmp_path, tiny_llama):
    import dataclasses

    from peft import LoraConfig, get_peft_model

    from qlora_kit.handles import AdaptedModel

    def adapt(folder):
        base = load_quantized(folder, 64, "float32", load_in_4bit=False, engine="native")
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
        fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        fields["model"] = get_peft_model(base.model, config)
        return randomize(AdaptedModel(**fields))

    assert_merges(adapt(make_checkpoint(tmp_path / "biased", "llama", attention_bias=True)))
    with pytest.raises(UnsupportedModelError, match="has none in this architecture"):
        MergedWeights(adapt(tiny_llama))


def test_a_tied_model_is_untied_only_when_the_adapter_parts_the_two(tiny_qwen3):
    def names_and_updates(**options):
        base = load_quantized(tiny_qwen3, 64, "float32", load_in_4bit=False, engine="native")
        with MergedWeights(randomize(attach_lora(base, r=4, **options))) as merged:
            return set(merged.names()), merged.config_updates()

    names, updates = names_and_updates()
    assert "lm_head.weight" not in names
    assert updates == {}
    for options in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ):
        names, updates = names_and_updates(**options)
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= names, options
        assert updates == {"tie_word_embeddings": False}, options


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_resized_vocabulary_merges(tiny_qwen3, load_in_4bit):
    base = load_quantized(tiny_qwen3, 64, "float32", load_in_4bit, engine="native")
    base.model.resize_token_embeddings(400, mean_resizing=False)
    model = randomize(attach_lora(base, r=4, target_modules=["q_proj", "embed_tokens"]))
    assert_merges(model)
    with MergedWeights(model) as merged:
        assert merged.shape("model.embed_tokens.weight") == (400, 64)


def test_the_original_base_gives_back_what_quantization_took(tiny_llama):
    import torch

    quantized = randomize(attach_lora(load_quantized(tiny_llama, 64, "float32", engine="native")))
    exact = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    exact = attach_lora(exact)
    factors = {n: p for n, p in quantized.model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in exact.model.named_parameters():
            if name in factors:
                parameter.copy_(factors[name])
    with MergedWeights(quantized, "original") as merged:
        rebuilt = rebuild(merged, quantized.model.get_base_model())
    torch.testing.assert_close(logits_of(rebuilt), logits_of(exact.model), atol=2e-5, rtol=1e-4)
    assert (logits_of(quantized.model) - logits_of(rebuilt)).abs().max() > 1e-2


def test_weights_packed_for_a_cpu_are_read_and_left_packed(tiny_llama):
    import torch
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    base = load_quantized(tiny_llama, 64, "bfloat16", engine="native")
    layer = base.model.model.layers[0].mlp.up_proj
    with MergedWeights(base, "dequantized") as merged:
        name = "model.layers.0.mlp.up_proj.weight"
        before = merged.load(name).clone()
        packed, state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data, layer.weight.quant_state = packed, state
        again = merged.load(name)
    # Packing rounds the scales to bfloat16, which is what the layer then computes with.
    torch.testing.assert_close(again.float(), before.float(), rtol=2**-6, atol=1e-6)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(layer.weight.data, packed)


def test_rounding_happens_once_and_overflow_is_refused(tiny_llama):
    import torch

    base = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    model = randomize(attach_lora(base, r=4))
    name = "model.layers.0.self_attn.q_proj.weight"
    with MergedWeights(model) as wide, MergedWeights(model, dtype=torch.bfloat16) as rounded:
        assert torch.equal(rounded.load(name), wide.load(name).to(torch.bfloat16))
        assert {rounded.load(n).dtype for n in rounded.names()} == {torch.bfloat16}
    with torch.no_grad():
        base.model.get_input_embeddings().weight[3, 3] = 1e6
    with (
        MergedWeights(model, dtype=torch.float16) as merged,
        pytest.raises(UnsupportedModelError, match=r"1e\+06, beyond float16.*dtype='bfloat16'"),
    ):
        merged.load("model.embed_tokens.weight")


def test_several_active_adapters_are_summed(tiny_llama):
    from peft import LoraConfig

    base = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    model = attach_lora(base, r=4)
    model.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.model.base_model.set_adapter(["default", "second"])
    assert_merges(randomize(model))


def test_what_cannot_be_merged_is_refused_by_name(tiny_llama):
    from peft import IA3Config, LoraConfig, get_peft_model

    def load():
        return load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")

    model = randomize(attach_lora(load()))
    model.model.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedModelError, match="switched off"):
        MergedWeights(model)
    model.model.base_model.enable_adapter_layers()
    model.model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="already merged"):
        MergedWeights(model)

    def with_model(peft_config):
        import dataclasses

        base = load()
        return dataclasses.replace(base, model=get_peft_model(base.model, peft_config))

    with pytest.raises(UnsupportedModelError, match="only LoRA"):
        MergedWeights(with_model(IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"],
                                           feedforward_modules=[])))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="only after its invocation tokens"):
        MergedWeights(
            with_model(LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1, 2]))
        )
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*MiCA"):
        MergedWeights(with_model(LoraConfig(target_modules=["q_proj"], init_lora_weights="mica")))


def test_the_base_is_chosen_and_wrong_choices_are_explained(tiny_llama, tmp_path):
    plain = load_quantized(tiny_llama, 64, "float32", engine="native")
    # The weights that were trained on; rounded to their grid again, they would swallow an update.
    assert choose_merge_base(plain, "auto") == "dequantized"
    assert choose_merge_base(plain, "auto", to_4bit=True) == "original"
    whole = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    assert choose_merge_base(whole, "auto") == choose_merge_base(whole, "auto", to_4bit=True)
    with pytest.raises(ConfigError, match="'auto', 'original' or 'dequantized', got 'orginal'"):
        choose_merge_base(plain, "orginal")
    loftq = attach_lora(
        load_quantized(tiny_llama, 64, "float32", engine="native"), loftq_config={"loftq_bits": 4}
    )
    assert choose_merge_base(loftq, "auto") == "dequantized"
    assert choose_merge_base(loftq, "auto", to_4bit=True) == "dequantized"
    with pytest.raises(ConfigError, match=r"LoftQ.*count that twice"):
        MergedWeights(loftq, "original")
    plain.model.save_pretrained(tmp_path / "nf4")
    plain.tokenizer.save_pretrained(tmp_path / "nf4")
    stored = attach_lora(load_quantized(tmp_path / "nf4", 64, "float32", engine="native"))
    assert choose_merge_base(stored, "auto") == "dequantized"
    with pytest.raises(ConfigError, match="holds only nf4"):
        MergedWeights(stored, "original")
    assert_merges(randomize(stored))


def test_an_original_that_does_not_fit_the_model_in_memory_is_refused(tiny_llama, tmp_path):
    import dataclasses

    model = randomize(attach_lora(load_quantized(tiny_llama, 64, "float32", engine="native")))
    other = make_checkpoint(tmp_path / "other", "llama", intermediate_size=160)
    moved = dataclasses.replace(model, base=dataclasses.replace(model.base, path=other))
    with pytest.raises(UnsupportedModelError, match=r"shape \(160, 64\).*base='dequantized'"):
        MergedWeights(moved, "original")


def test_the_scale_of_an_update_is_read_from_the_layer(tiny_llama):
    """An expected value by hand: W + alpha / sqrt(r) * B @ A."""
    import torch

    base = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    model = randomize(attach_lora(base, r=4, lora_alpha=6, use_rslora=True))
    layer = model.model.get_base_model().model.layers[1].mlp.down_proj
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = layer.base_layer.weight + 6 / math.sqrt(4) * b @ a
    with MergedWeights(model) as merged:
        actual = merged.load("model.layers.1.mlp.down_proj.weight")
    torch.testing.assert_close(actual, expected.detach().cpu(), atol=1e-6, rtol=1e-6)
