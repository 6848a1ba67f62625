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
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import PluginError, UnsupportedModelError
from qlora_kit.exporters.gguf import register_family, register_pre_tokenizer
from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.families import table as families
from qlora_kit.exporters.gguf.tokenizer import pre_tokenizers as pretokenizers
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


#: Of the families in ``families/dense.py`` and ``experts.py`` one shape is enough for every run.
SHAPED = [
    pytest.param(case, shape, marks=pytest.mark.slow)
    if case in tiny.NEW and shape == "aligned"
    else (case, shape)
    for case in sorted(tiny.CASES)
    for shape in ("aligned", "unaligned")
]


@pytest.mark.parametrize(("case", "shape"), SHAPED)
def test_llama_cpp_computes_what_transformers_does(case, shape, tmp_path):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config(case, shape))
    done = export(tmp_path, model.config, model, tokenizer, quantization=["f32", "q8_0"])
    ids = tokenizer(PROMPT)["input_ids"][:64]
    right = logits_of(model, ids)
    for name, limit in (("f32", 1e-6), ("q8_0", 5e-3)):
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
