"""Quantization: which type each tensor gets, its bytes, and what it costs."""

from __future__ import annotations

import ctypes
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_llama_quantize as llama_quantize
import gguf_tiny as tiny
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import ConfigError, ExportError, MissingDependencyError
from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.quantization import blocks as encoding
from qlora_kit.exporters.gguf.quantization import ggml
from qlora_kit.exporters.gguf.quantization.mixtures import ModelShape, choose_types
from qlora_kit.exporters.gguf.quantization.recipes import BLOCK_SIZES, RECIPES, resolve_recipes
from qlora_kit.exporters.gguf.verification.file_checks import TENSOR_TOLERANCES
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
from qlora_kit.weights.source import SafetensorsSource

torch = pytest.importorskip("torch")

BLOCK_TYPES = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith(("IQ1", "IQ2")) else name
    for name, size in BLOCK_SIZES.items()
    if size > 1
]
NEEDING = ["IQ2_XXS", "IQ2_XS", "IQ1_S"]

#: Mean KL divergence of random 2-layer models, twice what was measured for the worst family.
KL_LIMITS = {"f32": 1e-6, "f16": 2e-6, "bf16": 1e-4, "q8_0": 1e-3, "q6_k": 5e-3}
KL_LIMITS |= {"q5_k_m": 2e-2, "q5_k_s": 2e-2, "q5_0": 2.5e-2, "q5_1": 2e-2}
KL_LIMITS |= {"q4_k_m": 6e-2, "q4_k_s": 6e-2, "q4_0": 9e-2, "q4_1": 7e-2}
KL_LIMITS |= {"q3_k_l": 0.1, "q3_k_m": 0.1, "q3_k_s": 0.2, "q2_k": 0.3}
KL_LIMITS |= {"q2_k_s": 0.4, "q2_k_l": 0.3, "iq4_nl": 8e-2, "iq4_xs": 8e-2, "iq3_m": 0.15}
KL_LIMITS |= {"iq3_s": 0.25, "iq3_xs": 0.3, "iq3_xxs": 0.5, "iq2_m": 0.6, "iq2_s": 0.7}
KL_LIMITS |= {"iq2_xs": 0.8, "iq2_xxs": 1.0, "iq1_m": 1.5, "iq1_s": 1.6, "tq2_0": 4, "tq1_0": 4}


def random_rows(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_every_type_has_a_limit():
    assert set(KL_LIMITS) == set(RECIPES) - {"mxfp4_moe"}


#: ggml builds tables of many seconds for these, in every process and build that encodes them.
TABLED_RECIPES = [*llama_quantize.SLOW]


@pytest.mark.parametrize("shape", ["aligned", "unaligned"])
@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3"])
def test_every_type_runs_in_llama_cpp_as_close_as_its_bits_allow(case, shape, tmp_path):
    check_every_type(case, shape, tmp_path, [n for n in KL_LIMITS if n not in TABLED_RECIPES])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3"])
def test_types_of_one_and_two_bits_run_in_llama_cpp(case, tmp_path):
    check_every_type(case, "aligned", tmp_path, TABLED_RECIPES)


def check_every_type(case, shape, tmp_path, names):
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.make_model(tiny.make_config(case, shape))
    tiny.save_checkpoint(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with SafetensorsSource(tmp_path) as source:
        plan = plan_conversion(source, config)
        importance = llama_quantize.make_importance({t.name: t.shape for t in plan.tensors})
        for entry in importance.entries.values():
            entry.sums[:] = 1  # no column matters more in a random model
        done = convert(
            source, config, tokenizer, tmp_path, quantization=names,
            importance=importance,
        )  # fmt: skip
    ids = tokenizer(" ".join(tiny.TEXT[:3]))["input_ids"][:64]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].numpy()
    found = {}
    for name, path in done.files.items():
        with Llama(path) as llama:
            found[name] = float(kl_divergence(right, llama.logits(ids)).mean())
        assert GgufFile(path).value("general.file_type") == RECIPES[name].file_type
    wrong = {name: kl for name, kl in found.items() if not kl < KL_LIMITS[name]}
    assert not wrong, wrong


@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_bytes_are_those_of_the_quantizer_inside_llama_cpp(type_name, is_guided):
    """Two builds of ggml: the one that writes here, and the one in xllamacpp that runs files."""
    xllamacpp = pytest.importorskip("xllamacpp.xllamacpp", reason="a second build of ggml")
    other = ctypes.CDLL(xllamacpp.__file__)
    other.ggml_quantize_chunk.restype = ctypes.c_size_t
    other.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    rows = random_rows(64, 1024) * np.linspace(0.001, 10, 64, dtype=np.float32)[:, None]
    if type_name in NEEDING and not is_guided:
        pytest.skip("ggml has no such quantizer")
    importance = np.abs(random_rows(1, 1024, seed=9)[0]) ** 3 if is_guided else None
    ours = ggml.encode_rows(rows, type_name, importance)
    theirs = np.zeros_like(ours)
    other.ggml_quantize_chunk(
        ggml.type_number(type_name), rows.ctypes.data, theirs.ctypes.data, 0, 64, 1024,
        None if importance is None else importance.ctypes.data,
    )  # fmt: skip
    unguided = ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4", *NEEDING)
    if is_guided and type_name not in unguided:
        assert not np.array_equal(ours, ggml.encode_rows(rows, type_name))
    if type_name == "IQ1_M" and is_guided:
        # Its search compares sums of floats that the two builds round differently.
        assert (ours != theirs).mean() < 0.01
    else:
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("type_name", ggml._NUMPY_TYPES)
def test_the_fallback_encoder_writes_the_same_bytes(type_name, monkeypatch):
    rows = random_rows(16, 256)
    with_ggml = ggml.encode_rows(rows, type_name)
    hide_library(monkeypatch)
    assert np.array_equal(ggml.encode_rows(rows, type_name), with_ggml)


def hide_library(monkeypatch):
    monkeypatch.setattr(ggml, "_find_library", lambda: None)
    ggml._load_library.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_library():
    yield
    ggml._load_library.cache_clear()


def test_without_ggml_k_quants_are_refused_before_anything_is_read(monkeypatch):
    hide_library(monkeypatch)
    ggml.check_encoder({"Q8_0", "F16", "Q4_0"})
    with pytest.raises(MissingDependencyError, match=r"qlora-kit\[gguf\]"):
        ggml.check_encoder({"Q8_0", "Q4_K"})
    with pytest.raises(MissingDependencyError, match="importance"):
        ggml.check_encoder({"Q4_0"}, has_importance=True)


def test_a_library_of_another_layout_is_refused(monkeypatch):
    monkeypatch.setattr(ggml, "row_size", lambda name, columns: 1)
    ggml._load_library.cache_clear()
    with pytest.raises(MissingDependencyError, match="Update both"):
        ggml._load_library()


@pytest.mark.parametrize("type_name", [*BLOCK_TYPES, "F16", "BF16", "F32"])
def test_tolerances_hold_normal_weights_and_reject_twice_the_error(type_name):
    from gguf import GGMLQuantizationType, quants

    rows = random_rows(64, 1024, seed=3)
    importance = np.ones(1024, np.float32) if type_name in NEEDING else None
    encoded = encoding.encode_piece(torch.from_numpy(rows), type_name, "x", importance)
    if type_name == "BF16":
        back = torch.from_numpy(encoded.copy()).view(torch.bfloat16).float().numpy()
    elif type_name.startswith("F"):
        back = encoded.astype(np.float32)
    else:
        back = quants.dequantize(encoded, GGMLQuantizationType[type_name])
    error = np.sqrt(np.mean((back - rows) ** 2) / np.mean(rows**2))
    assert error < TENSOR_TOLERANCES[type_name]
    if type_name != "F32":
        assert 4 * error > TENSOR_TOLERANCES[type_name], f"too loose: {error:.4f}"


@given(
    rows=st.integers(1, 20),
    matrices=st.sampled_from([1, 2, 3]),
    columns=st.sampled_from([32, 64, 256, 512]),
    limit=st.integers(100, 5000),
    type_name=st.sampled_from(["F32", "F16", "Q8_0", "Q4_0"]),
)
@settings(max_examples=60, deadline=None)
def test_cutting_changes_no_byte(rows, matrices, columns, limit, type_name):
    tensor = torch.from_numpy(random_rows(rows * matrices, columns))
    whole = encoding.encode_piece(tensor, type_name, "x").tobytes()
    before = encoding._PIECE_NUMBERS
    encoding._PIECE_NUMBERS = limit
    try:
        pieces = [
            encoding.encode_piece(piece, type_name, "x").tobytes()
            for _, piece in encoding.cut_rows(tensor, matrices)
        ]
    finally:
        encoding._PIECE_NUMBERS = before
    assert b"".join(pieces) == whole


def test_numbers_that_cannot_be_stored_are_refused_by_name():
    rows = torch.ones(4, 256)
    for bad in (float("nan"), float("inf"), -float("inf")):
        rows[2, 7] = bad
        for type_name in ("F32", "F16", "Q8_0", "Q4_K"):
            with pytest.raises(ExportError, match=r"blk\.3.*not finite"):
                encoding.encode_piece(rows, type_name, "blk.3.ffn_up.weight")
    rows[2, 7] = -70000.0
    with pytest.raises(ExportError, match="bf16"):
        encoding.encode_piece(rows.to(torch.bfloat16), "F16", "x")
    assert encoding.encode_piece(rows, "BF16", "x").nbytes == rows.numel() * 2


# ---------------------------------------------------------------- which type where


def llama_tensors(layers, hidden=4096, inner=14336, vocab=32000, tied=False):
    names = [("token_embd.weight", (vocab, hidden)), ("output_norm.weight", (hidden,))]
    names += [] if tied else [("output.weight", (vocab, hidden))]
    for i in range(layers):
        names += [(f"blk.{i}.attn_{p}.weight", (hidden, hidden)) for p in ("q", "k", "v", "output")]
        names += [(f"blk.{i}.ffn_{p}.weight", (inner, hidden)) for p in ("gate", "up")]
        names += [(f"blk.{i}.ffn_down.weight", (hidden, inner))]
        names += [(f"blk.{i}.{p}_norm.weight", (hidden,)) for p in ("attn", "ffn")]
    return names


def layers_with(types, part, type_name, layers):
    return [i for i in range(layers) if types[f"blk.{i}.{part}.weight"] == type_name]


# Layers that llama.cpp gives more bits in a model of 32 layers, as in every published file.
MORE_BITS_32 = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize(
    ("name", "value", "down", "output", "rest"),
    [
        ("q8_0", ("Q8_0", None), ("Q8_0", None), "Q8_0", "Q8_0"),
        ("q4_0", ("Q4_0", None), ("Q4_0", None), "Q4_0", "Q4_0"),
        ("q6_k", ("Q6_K", None), ("Q6_K", None), "Q6_K", "Q6_K"),
        ("q4_k_m", ("Q6_K", MORE_BITS_32), ("Q6_K", MORE_BITS_32), "Q4_K", "Q4_K"),
        ("q5_k_m", ("Q6_K", MORE_BITS_32), ("Q6_K", MORE_BITS_32), "Q5_K", "Q5_K"),
        ("q4_k_s", ("Q5_K", [0, 1, 2, 3]), ("Q5_K", [0, 1, 2, 3]), "Q4_K", "Q4_K"),
        ("q5_k_s", ("Q5_K", None), ("Q5_K", None), "Q5_K", "Q5_K"),
        ("q3_k_s", ("Q3_K", None), ("Q3_K", None), "Q3_K", "Q3_K"),
        ("q3_k_m", ("Q5_K", [0, 1]), ("Q5_K", [0, 1]), "Q4_K", "Q3_K"),
        ("q3_k_l", ("Q5_K", None), ("Q5_K", None), "Q5_K", "Q3_K"),
        ("q2_k", ("Q4_K", None), ("Q3_K", None), "Q3_K", "Q2_K"),
    ],
)
def test_the_mixture_of_a_model_of_32_layers(name, value, down, output, rest):
    tensors = llama_tensors(32)
    types = choose_types(tensors, RECIPES[name], ModelShape("llama", 32, 32, 8))
    for part, (favoured, layers) in (("attn_v", value), ("ffn_down", down)):
        wanted = list(range(32)) if layers is None else layers
        assert layers_with(types, part, favoured, 32) == wanted
    assert {types[f"blk.{i}.attn_output.weight"] for i in range(32)} == {output}
    assert {types[f"blk.{i}.ffn_up.weight"] for i in range(32)} == {rest}
    assert types["output.weight"] == ("Q8_0" if name == "q8_0" else "Q6_K")
    assert types["token_embd.weight"] == rest
    assert {t for n, t in types.items() if "norm" in n} == {"F32"}


def test_exceptions_to_the_mixture():
    recipe = RECIPES["q4_k_m"]
    tied = choose_types(llama_tensors(4, tied=True), recipe, ModelShape("llama", 4, 8, 8))
    assert tied["token_embd.weight"] == "Q6_K"
    few = choose_types(llama_tensors(4), RECIPES["q2_k"], ModelShape("llama", 4, 8, 4))
    assert few["blk.0.attn_v.weight"] == "Q3_K"
    large = choose_types(llama_tensors(80), recipe, ModelShape("llama", 80, 64, 8))
    assert set(layers_with(large, "attn_v", "Q5_K", 80)) | set(
        layers_with(large, "attn_v", "Q6_K", 80)
    ) == set(range(80))
    eight = choose_types(llama_tensors(4), recipe, ModelShape("llama", 4, 8, 8, experts=8))
    assert eight["blk.1.attn_k.weight"] == eight["blk.1.attn_v.weight"] == "Q8_0"
    assert eight["blk.1.attn_output.weight"] == "Q5_K"
    router = choose_types(
        [("blk.0.ffn_gate_inp.weight", (4, 256)), ("token_embd.weight", (8, 256))],
        RECIPES["f16"],
        ModelShape("qwen3moe", 1, 8, 8, experts=4),
    )
    assert router["blk.0.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize(
    ("name", "columns", "wanted"),
    [
        ("q4_k_m", 576, "Q5_0"),
        ("q5_k_m", 576, "Q5_1"),
        ("q6_k", 576, "Q8_0"),
        ("q3_k_s", 576, "Q4_0"),
        ("q2_k", 576, "Q4_0"),
        ("q8_0", 80, "F16"),
        ("q4_k_m", 80, "F16"),
    ],
)
def test_rows_that_do_not_divide_fall_back(name, columns, wanted):
    tensors = [("blk.0.ffn_up.weight", (64, columns)), ("output.weight", (64, columns))]
    types = choose_types(tensors, RECIPES[name], ModelShape("llama", 1, 4, 4))
    assert types["blk.0.ffn_up.weight"] == wanted


@pytest.mark.parametrize("case", sorted(llama_quantize.CASES))
def test_types_are_those_that_llama_quantize_chose(case):
    """Recorded from llama.cpp's own quantizer; the recording compared the bytes as well."""
    recorded = [line for line in llama_quantize.read_recorded() if line[0] == case]
    family, shape, changes = llama_quantize.CASES[case]
    config = tiny.make_config(family, shape, **changes)
    source = tiny.make_shapes(config)
    for way in llama_quantize.list_ways(case):
        found = {name: types for _, w, names, types in recorded if w == way for name in names}
        assert set(found) == set(llama_quantize.list_recipes(case, way))
        plan = plan_conversion(
            source, config.to_dict(), quantization=list(found),
            settings=llama_quantize.make_settings(way),
        )  # fmt: skip
        for name, wanted in found.items():
            assert llama_quantize.describe_types(dict(plan.types[name])) == wanted, (way, name)


def test_a_file_of_llama_cpp_has_the_same_types(smollm2):
    """The published SmolLM2 file was made by llama-quantize."""
    file = GgufFile(smollm2)
    shapes = [(name, file.shape(name)) for name in file.tensors]
    heads = (file.value("llama.attention.head_count"), file.value("llama.attention.head_count_kv"))
    types = choose_types(shapes, RECIPES["q4_1"], ModelShape("llama", 30, *heads))
    assert types == {name: file.type_of(name) for name in file.tensors}


def test_names_of_types():
    assert [r.name for r in resolve_recipes(["Q4_K_M", "q4_k", "q8", "not_quantized"])] == [
        "q4_k_m",
        "q8_0",
        "f16",
    ]
    with pytest.raises(ConfigError, match="q4_k_m"):
        resolve_recipes("q4_k_n")
    with pytest.raises(ConfigError, match="'iq3_xs'"):
        resolve_recipes(["iq3_xz"])
    with pytest.raises(ConfigError, match="empty"):
        resolve_recipes([])
