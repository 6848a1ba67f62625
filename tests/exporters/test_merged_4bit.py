"""``merged_4bit`` exports load in plain transformers, with the numbers bitsandbytes would give."""

import json

import pytest

from checkpoints import make_checkpoint, make_tokenizer, randomize
from exported import damage_file, edit_json, end_answers_with, load_plain
from forward import logits_of
from qlora_kit import attach_lora, export_model, load_quantized
from qlora_kit.engines.peft_model import keep_weights_unpacked
from qlora_kit.errors import ConfigError, VerificationError
from qlora_kit.exporters.merged_4bit import Merged4bit


def quantize_in_transformers(folder, dtype, *, double=True):
    """A 16-bit checkpoint as ``load_in_4bit=True`` puts it into memory."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return load_plain(folder, quantization_config=config)


def assert_same_state(one, other):
    """Every tensor of two 4-bit models equal bit for bit, quantization states included."""
    import torch
    from bitsandbytes.functional import QuantState

    first, second = one.state_dict(), other.state_dict()
    assert set(first) == set(second)
    for name, tensor in first.items():
        if "quant_state" not in name:
            assert tensor.dtype == second[name].dtype, name
            assert torch.equal(tensor, second[name]), name
    states = [name for name in first if "quant_state" in name]
    for name in states:
        weight = name.split(".quant_state")[0]

        def state(tensors, weight=weight):
            pieces = {k: v for k, v in tensors.items() if k.startswith(f"{weight}.")}
            return QuantState.from_dict(pieces, torch.device("cpu"))

        assert state(first).as_dict().keys() == state(second).as_dict().keys()
        assert state(first) == state(second)
        assert state(first).offset == state(second).offset
    return states


def make_gpt2(folder):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    make_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=384, n_positions=128, n_embd=64, n_layer=2, n_head=4,
                bos_token_id=None, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


CASES = {
    "llama": ("llama", {}, {}, {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}, {}, {}),
    "tied, head adapted": (
        "qwen3", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}, {},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"bias": "all"}, {}),
    "rows that do not divide into blocks": (
        "llama", {"hidden_size": 72, "intermediate_size": 100}, {}, {"use_double_quant": False},
    ),
    "odd sizes": ("llama", {"hidden_size": 72, "intermediate_size": 101}, {}, {}),
    "float16, single quantization": ("llama", {}, {"use_dora": True}, {
        "dtype": "float16", "use_double_quant": False,
    }),
    "modules in full": ("llama", {}, {"modules_to_save": ["lm_head", "embed_tokens"]}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "shape", "adapter", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_it_equals_what_loading_the_16_bit_export_in_4_bits_gives(
    tmp_path, kind, shape, adapter, options, load_in_4bit
):
    import torch
    from bitsandbytes.nn import Linear4bit

    base = load_quantized(
        make_checkpoint(tmp_path / "base", kind, **shape), 64, "float32", load_in_4bit,
        engine="native",
    )  # fmt: skip
    model = randomize(attach_lora(base, r=4, **adapter))
    both = export_model(model, "merged_4bit", tmp_path / "4", verify="full", **options)
    options = dict(options)
    double = options.pop("use_double_quant", True)
    # The base that merged_4bit takes by itself.
    options.setdefault("base", both.facts["base"])
    export_model(model, "merged_16bit", tmp_path / "16", verify=False, **options)
    dtype = getattr(torch, both.facts["dtype"])
    ours, theirs = load_plain(tmp_path / "4"), quantize_in_transformers(
        tmp_path / "16", dtype, double=double
    )  # fmt: skip
    layer = ours.model.layers[1].mlp.down_proj
    assert type(layer) is Linear4bit
    assert layer.compute_dtype == dtype
    assert type(ours.lm_head) is torch.nn.Linear
    assert len(assert_same_state(theirs, ours)) == both.facts["quantized_tensors"] == 14
    # bitsandbytes 0.50 cannot repack the odd shapes for a CPU with AVX512-BF16.
    for each in (ours, theirs):
        keep_weights_unpacked(each)
    assert torch.equal(logits_of(ours), logits_of(theirs))


def test_layers_stored_the_other_way_round_are_turned(tmp_path):
    """GPT-2 keeps (in, out); bitsandbytes wants (out, in)."""
    import dataclasses

    from peft import LoraConfig, get_peft_model

    base = load_quantized(make_gpt2(tmp_path / "base"), 64, "float32", False, engine="native")
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = randomize(dataclasses.replace(base, model=get_peft_model(base.model, config)))
    artifact = export_model(model, "merged_4bit", tmp_path / "4", verify="full")
    assert artifact.facts["quantized_tensors"] == 8
    export_model(model, "merged_16bit", tmp_path / "16", verify=False)
    import torch

    assert_same_state(
        quantize_in_transformers(tmp_path / "16", torch.bfloat16), load_plain(tmp_path / "4")
    )


def test_the_result_says_what_quantizing_again_cost(adapted, tmp_path):
    import torch

    artifact = export_model(adapted, "merged_4bit", tmp_path / "out")
    checks = {check.name: check for check in artifact.verification.checks}
    assert list(checks) == [
        "tensors", "quantized values", "configuration", "stop tokens", "tokenizer", "logits",
        "generation stops",
    ]  # fmt: skip
    assert artifact.facts["kl"] == checks["logits"].value > 0
    assert artifact.facts["kl_max"] >= artifact.facts["kl"]
    assert 0 < artifact.facts["same_top_token"] <= 1
    manifest = json.loads((tmp_path / "out" / "qlora_kit_manifest.json").read_text())
    assert manifest["facts"]["kl"] == artifact.facts["kl"]
    # By hand on one prompt, in plain transformers.
    live = torch.log_softmax(logits_of(adapted.model).double(), -1)
    again = torch.log_softmax(logits_of(load_plain(tmp_path / "out")).double(), -1)
    kl = (live.exp() * (live - again)).sum(-1).mean().item()
    assert kl == pytest.approx(artifact.facts["kl"], rel=1.0)
    silent = export_model(adapted, "merged_4bit", tmp_path / "silent", verify=False)
    assert "kl" not in silent.facts


def test_the_folder_is_complete_and_small(adapted, tmp_path):
    artifact = export_model(adapted, "merged_4bit", tmp_path / "out")
    assert {file.name for file in artifact.files} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qlora_kit_manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = config["quantization_config"]
    assert stated["quant_method"] == "bitsandbytes"
    assert stated["load_in_4bit"] is True
    assert stated["bnb_4bit_quant_type"] == "nf4"
    assert stated["bnb_4bit_use_double_quant"] is True
    assert stated["bnb_4bit_compute_dtype"] == "bfloat16"
    assert stated["llm_int8_skip_modules"] == ["lm_head"]


def test_rounding_to_the_same_grid_again_is_warned_of(make_adapted, tmp_path, caplog):
    model = make_adapted(std=0.004)
    good = export_model(model, "merged_4bit", tmp_path / "original")
    assert "swallow" not in caplog.text
    export_model(model, "merged_4bit", tmp_path / "dequantized", base="dequantized")
    assert "can swallow small updates" in caplog.text
    assert good.facts["base"] == "original"


def test_it_trains_on_as_a_base(adapted, tmp_path):
    """The usual next step: a QLoRA on the merged 4-bit model."""
    export_model(adapted, "merged_4bit", tmp_path / "out")
    again = load_quantized(tmp_path / "out", 64, "float32", engine="native")
    assert again.base.is_prequantized
    assert again.base.quantization == "nf4"
    model = randomize(attach_lora(again, r=2))
    artifact = export_model(model, "merged_4bit", tmp_path / "second", verify="full")
    assert artifact.facts["base"] == "dequantized"
    with pytest.raises(ConfigError, match="holds only nf4"):
        export_model(model, "merged_4bit", tmp_path / "third", base="original")


def test_shards_have_an_index(make_adapted, tmp_path):
    base = make_checkpoint(tmp_path / "base", "llama", hidden_size=256, intermediate_size=1024)
    model = make_adapted(base, load_in_4bit=False)
    artifact = export_model(
        model, "merged_4bit", tmp_path / "out", max_shard_size="1MB", verify="full"
    )
    shards = [file.name for file in artifact.files if file.name.endswith(".safetensors")]
    assert len(shards) >= 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    load_plain(tmp_path / "out")


def test_generation_stops_where_the_template_ends_answers(make_adapted, tmp_path):
    model = end_answers_with(make_adapted(), "<|im_start|>")
    artifact = export_model(model, "merged_4bit", tmp_path / "out")
    stops = next(c for c in artifact.verification.checks if c.name == "generation stops")
    assert "[2, 1]" in stops.detail
    assert load_plain(tmp_path / "out").generation_config.eos_token_id == [2, 1]


def _quantize_base(request, tensors, name):
    """Replace a weight's pieces by what they are when the adapter was forgotten."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file

    weight = load_file(request.model.base.path / "model.safetensors")[name]
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    tensors[name] = packed
    for key, piece in state.as_dict(packed=True).items():
        size = len(tensors[f"{name}.{key}"])
        if "quant_state" in key:
            piece = torch.nn.functional.pad(piece, (0, size - len(piece)), value=ord(" "))
        tensors[f"{name}.{key}"] = piece.clone()


def _break(folder, damage, request):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    if damage_file(folder, damage):
        return
    if damage == "config":
        edit_json(folder / "config.json", rms_norm_eps=0.5)
        return
    if damage == "quantization_config":
        edit_json(folder / "config.json", quantization_config=None)
        return
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "missing":
        del tensors[f"{name}.absmax"]
    elif damage == "adapter left out":
        for key in [k for k in tensors if k.endswith("_proj.weight")]:
            _quantize_base(request, tensors, key)
    elif damage == "one adapter left out":
        _quantize_base(request, tensors, name)
    elif damage == "codes swapped":
        packed = tensors[name]
        tensors[name] = (packed << 4) | (packed >> 4)
    elif damage == "a scale":
        tensors[f"{name}.absmax"][0] = 255 - tensors[f"{name}.absmax"][0]
    elif damage == "table":
        tensors[f"{name}.quant_map"][3] = 0.0
    elif damage == "state":
        import torch

        key = f"{name}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist()))
        text = json.dumps({**state, "nested_offset": state["nested_offset"] * 1.1})
        tensors[key] = torch.tensor(list(text.encode().ljust(len(tensors[key]))), dtype=torch.uint8)
    elif damage == "base changed":
        tensors["model.norm.weight"][5] *= 1.05
    elif damage == "one code, full":
        tensors[name][1000] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "found_by"),
    [
        ("truncated", "tensors.*not a whole safetensors file"),
        ("missing", "1 missing"),
        ("adapter left out", "quantized values.*14 weights do not hold.*adapter changes"),
        ("one adapter left out", "quantized values.*1 weights.*down_proj.*adapter changes"),
        ("codes swapped", "quantized values.*down_proj"),
        ("a scale", "quantized values.*down_proj"),
        ("table", "quantized values.*down_proj"),
        ("state", "quantized values.*down_proj"),
        ("base changed", "quantized values.*norm"),
        ("one code, full", "quantized values.*down_proj"),
        ("eos", r"stop tokens.*\[1\], the live model at \[2\]"),
        ("tokenizer", "tokenizer: the end token"),
        ("config", "configuration: rms_norm_eps is 0.5 and should be 1e-06"),
        ("quantization_config", "configuration: quantization_config is None"),
    ],
)
def test_a_broken_export_is_caught_and_removed(adapted, tmp_path, monkeypatch, damage, found_by):
    write = Merged4bit.write

    def write_broken(self, request, folder):
        facts = write(self, request, folder)
        _break(folder, damage, request)
        return facts

    monkeypatch.setattr(Merged4bit, "write", write_broken)
    verify = "full" if damage.endswith("full") else True
    with pytest.raises(VerificationError, match=found_by):
        export_model(adapted, "merged_4bit", tmp_path / "out", verify=verify)
    assert list(tmp_path.iterdir()) == []
    # And without looking, it would have gone through.
    export_model(adapted, "merged_4bit", tmp_path / "out", verify=False)


def test_a_small_adapter_left_out_is_seen_in_the_codes(make_adapted, tmp_path, monkeypatch):
    """Updates far below the distance of two codes change some of them all the same."""
    model = make_adapted(std=0.004)
    write = Merged4bit.write

    def write_broken(self, request, folder):
        facts = write(self, request, folder)
        _break(folder, "one adapter left out", request)
        return facts

    monkeypatch.setattr(Merged4bit, "write", write_broken)
    with pytest.raises(VerificationError, match="down_proj"):
        export_model(model, "merged_4bit", tmp_path / "out")


def test_pieces_are_made_once_and_not_kept(adapted, tmp_path, monkeypatch):
    from bitsandbytes import functional

    from qlora_kit.weights import nf4

    calls, sources = [], []
    real_quantize, real_init = functional.quantize_4bit, nf4.Nf4Weights.__init__

    def count(weight, **options):
        calls.append(weight.shape)
        return real_quantize(weight, **options)

    def remember(self, *args, **options):
        sources.append(self)
        real_init(self, *args, **options)

    monkeypatch.setattr(functional, "quantize_4bit", count)
    monkeypatch.setattr(nf4.Nf4Weights, "__init__", remember)
    export_model(adapted, "merged_4bit", tmp_path / "out", verify=False)
    assert len(calls) == 14
    assert sources
    assert all(not source._ready for source in sources)
