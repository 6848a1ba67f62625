"""Every family, run in llama.cpp and compared with transformers in float32."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gguf_tiny as tiny
import qlora_kit
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import PluginError, UnsupportedModelError
from qlora_kit.exporters.gguf import register_family, register_pre_tokenizer
from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.families import table as families
from qlora_kit.exporters.gguf.tokenizer import pre_tokenizers as pretokenizers
from qlora_kit.weights.dequantize import dequantize
from qlora_kit.weights.merged import MergedWeights
from qlora_kit.weights.source import SafetensorsSource

torch = pytest.importorskip("torch")

PROMPT = (
    "The quick brown fox jumps over the lazy dog, 1234 times; and the capital of Italy is Rome. "
    "def f(x): return x"
)


def export(folder, config, model, tokenizer, **options):
    tiny.save_checkpoint(model, tokenizer, folder)
    stored = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        return convert(source, stored, tokenizer, folder, **options)


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


#: Of the families outside of ``families/table.py`` one shape is enough for every run.
SHAPED = [
    pytest.param(case, shape, marks=pytest.mark.slow)
    if case in tiny.NEW and shape == "aligned"
    else (case, shape)
    for case in sorted(tiny.CASES)
    for shape in ("aligned", "unaligned")
]


#: Mean KL divergences where 16 bits of keys, values and gelu's table, or a router's near ties, make
#: more of the random models: in float32 and in q8_0.
LIMITS = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), (1e-7, 5e-2)),
    "gemma3n": (5e-6, 1e-2),
    "gemma3n-shared": (5e-5, 5e-2),
    "gemma4-moe": (2e-5, 1e-2),
}


@pytest.fixture
def spread_as_in_llama_cpp(monkeypatch):
    """Gemma 3n's sparsity with llama.cpp's estimate of the spread: over one number fewer."""
    std = torch.std

    def estimate(*inputs, unbiased, **options):
        return std(*inputs, unbiased=True, **options)

    monkeypatch.setattr(torch, "std", estimate)


@pytest.mark.usefixtures("spread_as_in_llama_cpp")
@pytest.mark.parametrize(("case", "shape"), SHAPED)
def test_llama_cpp_computes_what_transformers_does(case, shape, tmp_path):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config(case, shape))
    done = export(tmp_path, model.config, model, tokenizer, quantization=["f32", "q8_0"])
    ids = tokenizer(PROMPT)["input_ids"][:64]
    right = logits_of(model, ids)
    limits = LIMITS.get(case, (1e-6, 5e-3))
    for name, limit in zip(("f32", "q8_0"), limits, strict=True):
        with Llama(done.files[name]) as llama:
            kl = kl_divergence(right, llama.logits(ids))
        assert kl.mean() < limit, f"{case}/{shape}/{name}: mean KL {kl.mean():.2e}"


@pytest.mark.parametrize("damage", ["query rows", "key rows", "one norm"])
def test_the_comparison_notices_a_wrong_tensor(damage, tmp_path, monkeypatch):
    """Without the permutation, or with one norm off, the logits are far away."""
    family = families.FAMILIES["llama"]
    changes = dict(family.transforms)
    if damage == "one norm":
        changes["model.norm.weight"] = lambda weight, config: weight * 1.2
    else:
        del changes[f"{damage[0]}_proj.weight"]
    monkeypatch.setitem(families.FAMILIES, "llama", dataclasses.replace(family, transforms=changes))
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config("llama"))
    done = export(tmp_path, model.config, model, tokenizer, quantization="f32")
    ids = tokenizer(PROMPT)["input_ids"][:64]
    with Llama(done.files["f32"]) as llama:
        assert kl_divergence(logits_of(model, ids), llama.logits(ids)).mean() > 1e-4


@pytest.mark.parametrize(("length", "context"), [(120, 256), (400, 512)])
@pytest.mark.parametrize("part", [1.0, 0.75])
def test_longrope_uses_the_table_of_the_context(part, length, context, tmp_path, monkeypatch):
    """With all of a head rotated as in Phi-3, and a part of it as in Phi-4-mini."""
    case = tiny.longrope_case(int(64 * part))
    case["rope_parameters"]["partial_rotary_factor"] = part
    monkeypatch.setitem(tiny.CASES, "phi3-long", ("Phi3Config", case))
    model = tiny.make_model(tiny.make_config("phi3-long"))
    done = export(tmp_path, model.config, model, tiny.byte_level_tokenizer(), quantization="f32")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (length,), generator=generator).tolist()
    with Llama(done.files["f32"], n_ctx=context) as llama:
        assert kl_divergence(logits_of(model, ids), llama.logits(ids)).mean() < 1e-6
    assert any("LongRoPE" in note for note in done.notes)


@pytest.mark.parametrize("case", ["llama", "llama3-rope", "gemma3", "phi3", "qwen3"])
def test_configurations_of_transformers_4_say_the_same(case):
    """``rope_theta`` and ``rope_scaling`` at the top, instead of ``rope_parameters``."""
    new = tiny.make_config(case).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    rope = new["rope_parameters"]
    if case == "gemma3":
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = old.pop("_sliding_window_pattern")
        del old["layer_types"]
    else:
        old["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        old["rope_scaling"] = None
        if scaling["rope_type"] != "default":
            scaling["type"] = scaling.pop("rope_type")
            old["rope_scaling"] = scaling
    described = [
        families.find_family(config).describe_model(families.Config(config))
        for config in (new, old)
    ]
    assert described[0] == described[1]


def shapes_of(case, **changes):
    config = tiny.make_config(case, **changes)
    return tiny.make_shapes(config).shapes, config.to_dict()


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("llama", {"model_type": "mamba"}, "'mamba'"),
        ("llama", {"hidden_act": "relu2"}, "'relu2'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
        ("llama", {"rope_parameters": {**tiny._YARN, "beta_fast": 4.0}}, "beta_fast=4.0"),
        ("llama", {"rope_parameters": {**tiny._YARN, "truncate": False}}, "truncate=False"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "without 'factor'"),
        ("qwen2", {"rope_parameters": tiny._LLAMA3_ROPE}, "'llama3'"),
        ("gemma2", {"rope_parameters": tiny._LINEAR}, "'linear'"),
        ("phi3", {"rope_parameters": tiny._YARN}, "'yarn'"),
        ("llama", {"rms_norm_eps": None}, "'rms_norm_eps'"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "sliding and full"),
        ("gemma2", {"attn_logit_softcapping": None}, "'attn_logit_softcapping'"),
        ("gemma3", {"use_bidirectional_attention": True}, "both ways"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "dense layers"),
        ("llama-tied", {"tie_word_embeddings": False}, "lm_head"),
        ("smollm3", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("olmo2", {"head_dim": 32}, "head_dim is 32"),
        ("exaone4", {"sliding_window": 8, "layer_types": None}, "64 layers"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("lfm2", {"conv_bias": True}, "conv_bias"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "sliding and full"),
        ("deepseek_v3", {"rope_parameters": tiny._YARN}, "mscale=None"),
        ("qwen3_5", {"linear_value_head_dim": 64}, "linear_value_head_dim is 64"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("gemma3n", {"laurel_rank": 32}, "laurel_rank"),
        ("gemma3n", {"num_kv_shared_layers": 2}, "share keys and values"),
        ("gemma3n", {"activation_sparsity_pattern": [0.0] * 6}, "activation_sparsity_pattern"),
        ("gemma3n", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "both ways"),
        ("gemma4", {"num_kv_shared_layers": 1}, "share keys and values"),
        ("llama4", {"attention_chunk_size": 64}, "attention_chunk_size"),
        ("llama4", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
        ("llama4", {"moe_layers": [0]}, "moe_layers"),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "moe_layer_end_index"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk"),
        ("granite-hybrid", {"mamba_n_groups": 2}, "mamba_n_groups"),
        ("granite-hybrid", {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ("falcon_h1", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
        ("falcon_h1", {"tie_word_embeddings": True}, "multiplied otherwise"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(case, change, said):
    shapes, config = shapes_of(case)
    shapes = {k: v for k, v in shapes.items() if "lm_head" not in k or case != "llama-tied"}
    with pytest.raises(UnsupportedModelError, match=None) as caught:
        plan_conversion(tiny.Shapes(shapes), config | change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.vision_tower.patch.weight"),
        ("mistral", "model.layers.1.self_attn.q_proj.bias"),
        ("qwen2", "model.layers.0.mlp.up_proj.bias"),
        ("qwen3", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("gemma2", "model.layers.0.self_attn.sinks"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(case, name):
    shapes, config = shapes_of(case)
    with pytest.raises(UnsupportedModelError) as caught:
        plan_conversion(tiny.Shapes(shapes | {name: (8, 8)}), config)
    assert name in str(caught.value)


def test_a_missing_tensor_and_a_missing_expert_are_noticed():
    shapes, config = shapes_of("llama")
    del shapes["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.attn_output"):
        plan_conversion(tiny.Shapes(shapes), config)
    shapes, config = shapes_of("qwen3-moe")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert name in shapes, "transformers 5 keeps experts in one tensor"
    experts, rows, columns = shapes.pop(name)
    for index in range(experts):
        if index != 2:
            part = f"model.layers.0.mlp.experts.{index}"
            shapes[f"{part}.gate_proj.weight"] = (rows // 2, columns)
            shapes[f"{part}.up_proj.weight"] = (rows // 2, columns)
    with pytest.raises(UnsupportedModelError, match="no complete set of experts"):
        plan_conversion(tiny.Shapes(shapes), config)


class Numbered(tiny.Shapes):
    """Of every tensor each column is its own number."""

    def load(self, name):
        shape = self.shapes[name]
        return torch.arange(shape[-1], dtype=torch.float32).expand(shape)


def test_what_is_known_of_columns_goes_where_the_file_has_them():
    """As an importance matrix and an adapter's first factor do."""
    shapes, config = shapes_of("qwen3_5")
    planned = {t.name: t for t in plan_conversion(tiny.Shapes(shapes), config).tensors}
    tensor = planned["blk.0.ssm_out.weight"]
    stored = tensor.load(Numbered(shapes))
    numbers = torch.arange(stored.shape[-1], dtype=torch.float32)
    assert not torch.equal(stored[0], numbers), "value heads are tiled, so columns move"
    assert torch.equal(tensor.reorder_columns(numbers[None])[0], stored[0])
    assert planned["blk.0.attn_qkv.weight"].reorder_columns is None


@pytest.mark.parametrize(
    ("case", "added"),
    [
        ("qwen3_5", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]),
        ("glm4_moe", ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight"]),
    ],
)
def test_a_head_for_tokens_further_ahead_is_left_out_and_said(case, added):
    shapes, config = shapes_of(case)
    plain = plan_conversion(tiny.Shapes(shapes), config)
    more = plan_conversion(tiny.Shapes(shapes | dict.fromkeys(added, (8, 8))), config)
    assert [t.name for t in more.tensors] == [t.name for t in plain.tensors]
    assert any(f"2 tensors that predict tokens further ahead, such as {added[0]}" in note
               for note in more.description.notes)  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="no place"):
        plan_conversion(tiny.Shapes(shapes | {"model.layers.9.mlp.up_proj.weight": (8, 8)}), config)


def test_experts_in_one_tensor_or_one_each_give_the_same_file(tmp_path):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config("qwen3-moe"))
    stored = export(tmp_path, model.config, model, tokenizer, quantization="q4_k_m")

    class InMemory(tiny.Shapes):
        def load(self, name):
            return model.state_dict()[name]

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    (tmp_path / "live").mkdir()
    live = convert(
        InMemory(shapes),
        model.config.to_dict(),
        tokenizer,
        tmp_path / "live",
        quantization="q4_k_m",
    )
    assert live.files["q4_k_m"].read_bytes() == stored.files["q4_k_m"].read_bytes()


def test_lm_head_of_a_tied_checkpoint_and_rotary_tables_are_left_out():
    shapes, config = shapes_of("llama-tied")
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (32,)
    names = [tensor.name for tensor in plan_conversion(tiny.Shapes(shapes), config).tensors]
    assert "output.weight" not in names
    assert "token_embd.weight" in names
    assert not any("rot" in name for name in names)


def test_a_window_that_llama_cpp_ignores_is_said():
    shapes, config = shapes_of("mistral", sliding_window=32)
    notes = plan_conversion(tiny.Shapes(shapes), config).description.notes
    assert any("last 32 tokens" in note for note in notes)


def test_a_text_model_is_taken_out_of_one_that_sees(tmp_path):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_wrapper("gemma3"))
    done = export(tmp_path, model.config, model, tokenizer, quantization="f32")
    assert done.plan.family.architecture == "gemma3"
    (note,) = (note for note in done.notes if "text model alone" in note)
    assert "34 tensors" in note
    ids = tokenizer(PROMPT)["input_ids"][:64]
    with Llama(done.files["f32"]) as llama:
        assert kl_divergence(logits_of(model, ids), llama.logits(ids)).mean() < 1e-6


def load_tiny(folder, case, targets, **loading):
    """A tiny model through the front door, with adapters that say something."""
    model = tiny.make_model(tiny.make_config(case, "unaligned"))
    tiny.save_checkpoint(model, tiny.byte_level_tokenizer(), folder)
    loaded = qlora_kit.load_quantized(folder, load_in_4bit=False, dtype="float32")
    adapted = qlora_kit.attach_lora(loaded, r=4, target_modules=targets)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return adapted


@pytest.mark.parametrize("case", ["qwen3_5", "granite-hybrid"])
def test_an_adapter_file_fits_matrices_that_are_reordered_or_taken_apart(case, tmp_path):
    adapted = load_tiny(tmp_path / "base", case, "all-linear")
    done = qlora_kit.export_model(adapted, "gguf-lora", tmp_path / "lora")
    with SafetensorsSource(tmp_path / "base") as source:
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        base = convert(source, config, adapted.tokenizer, tmp_path, quantization="f32")
    ids = adapted.tokenizer(PROMPT)["input_ids"][:64]
    right = logits_of(adapted.model.eval(), ids)
    with Llama(base.files["f32"], lora=done.path / done.facts["file"]) as llama:
        assert kl_divergence(right, llama.logits(ids)).mean() < 1e-6
    with Llama(base.files["f32"]) as llama:
        assert kl_divergence(right, llama.logits(ids)).mean() > 1e-4


def test_an_adapter_that_llama_cpp_would_pass_by_is_refused(tmp_path):
    adapted = load_tiny(tmp_path / "base", "gemma4", ["q_proj", "per_layer_model_projection"])
    with pytest.raises(UnsupportedModelError, match="past any adapter"):
        qlora_kit.export_model(adapted, "gguf-lora", tmp_path / "lora")


def test_four_bits_of_a_text_model_with_experts_are_merged_as_they_were_trained_on(tmp_path):
    """Its files call every tensor otherwise than the text model does, and hold its 16 bits."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(tiny.make_wrapper("qwen3_5_moe"))
    tiny.save_checkpoint(whole, tiny.byte_level_tokenizer(), tmp_path)
    loaded = qlora_kit.load_quantized(tmp_path, dtype="float32")
    adapted = qlora_kit.attach_lora(loaded, r=4, target_modules=["q_proj"])
    name = "layers.0.linear_attn.in_proj_qkv"
    module = adapted.model.get_submodule(f"base_model.model.model.{name}")
    with MergedWeights(adapted, "dequantized") as merged:
        stored = merged.load(f"model.language_model.{name}.weight")
    assert torch.equal(stored, dequantize(module, "weight").float().cpu())
    with pytest.raises(UnsupportedModelError, match="base='original'"):
        MergedWeights(adapted, "original")


def test_families_and_pre_tokenizers_are_registered_once(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(pretokenizers, "PRE_TOKENIZERS", dict(pretokenizers.PRE_TOKENIZERS))
    llama, gpt2 = families.FAMILIES["llama"], pretokenizers.PRE_TOKENIZERS["gpt-2"]
    register_family(llama)
    register_pre_tokenizer(gpt2)
    with pytest.raises(PluginError, match="'llama' exists"):
        register_family(dataclasses.replace(llama, activation="gelu"))
    with pytest.raises(PluginError, match="'gpt-2' exists"):
        register_pre_tokenizer(dataclasses.replace(gpt2, patterns=()))
    register_pre_tokenizer(dataclasses.replace(gpt2, name="mine"))
    assert pretokenizers.PRE_TOKENIZERS["mine"].patterns == gpt2.patterns


def test_a_familys_own_names_come_before_the_maps(monkeypatch):
    own = dataclasses.replace(
        families.FAMILIES["llama"],
        names={"model.blocks.{bid}.wq": "blk.{bid}.attn_q", "model.final": "output_norm"},
    )
    monkeypatch.setitem(families.FAMILIES, "llama", own)
    shapes, config = shapes_of("llama")
    spelled = {
        name.replace("layers", "blocks").replace("self_attn.q_proj", "wq")
        if "q_proj" in name
        else name.replace("model.norm", "model.final"): shape
        for name, shape in shapes.items()
    }
    assert set(spelled) != set(shapes)
    plain = {tensor.name for tensor in plan_conversion(tiny.Shapes(shapes), config).tensors}
    renamed = plan_conversion(tiny.Shapes(spelled), config).tensors
    assert {tensor.name for tensor in renamed} == plain


def test_the_family_of_the_documentation_works_as_a_plugin(tmp_path, monkeypatch):
    """The block in docs/gguf.md, installed as somebody else's package in a fresh process."""
    docs = Path(__file__).parents[3] / "docs" / "gguf.md"
    blocks = re.findall(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "register_family(" in block)
    site = tmp_path / "site"
    info = site / "glm_gguf-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "glm_gguf.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: glm-gguf\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qlora_kit]\nglm = glm_gguf\n")
    monkeypatch.setitem(tiny.CASES, "glm", ("GlmConfig", {"attention_bias": True}))
    tokenizer = tiny.byte_level_tokenizer()
    models = {}
    for shape in ("aligned", "unaligned"):
        models[shape] = tiny.make_model(tiny.make_config("glm", shape))
        tiny.save_checkpoint(models[shape], tokenizer, tmp_path / shape)
    script = """
        import sys, qlora_kit
        for shape in ("aligned", "unaligned"):
            base = f"{sys.argv[1]}/{shape}"
            model = qlora_kit.load_quantized(base, load_in_4bit=False, dtype="float32")
            types = ["f32", "q4_k_m"]
            done = qlora_kit.export_model(model, "gguf", f"{base}-out", quantization=types)
            print(done.path / done.facts["files"]["f32"])
    """
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ids = tokenizer(PROMPT)["input_ids"][:64]
    for model, path in zip(models.values(), done.stdout.splitlines(), strict=True):
        with Llama(Path(path)) as llama:
            assert kl_divergence(logits_of(model, ids), llama.logits(ids)).mean() < 1e-6


@pytest.mark.parametrize(
    ("case", "is_tied"), [("gemma2", True), ("gemma3", True), ("qwen2", False)]
)
def test_a_head_is_tied_where_the_familys_configurations_leave_it_out(case, is_tied):
    shapes, config = shapes_of(case, tie_word_embeddings=True)
    del config["tie_word_embeddings"]
    if is_tied:
        names = [tensor.name for tensor in plan_conversion(tiny.Shapes(shapes), config).tensors]
        assert "output.weight" not in names
    else:
        with pytest.raises(UnsupportedModelError, match="lm_head"):
            plan_conversion(tiny.Shapes(shapes), config)
