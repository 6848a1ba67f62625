"""Loading: what is found, what is refused, and that nothing is downloaded."""

import json
import shutil

import pytest

from forward import logits_of
from qlora_kit import attach_lora, load_quantized
from qlora_kit.errors import (
    ConfigError,
    MissingDependencyError,
    ModelNotFoundError,
    OfflineError,
    QloraKitError,
    UnsupportedModelError,
)


def _layer(model):
    return model.model.get_submodule("model.layers.0.self_attn.q_proj")


def test_four_bit_is_nf4_with_double_quantization(tiny_llama):
    import torch
    from bitsandbytes.nn import Linear4bit

    loaded = load_quantized(tiny_llama, max_seq_length=64, dtype="float32")
    layer = _layer(loaded)
    assert isinstance(layer, Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype is torch.float32
    assert loaded.base.quantization == "nf4"
    assert loaded.base.compute_dtype == "float32"
    assert loaded.base.stop_token_ids == (2,)
    model, tokenizer = loaded
    assert model is loaded.model
    assert tokenizer is loaded.tokenizer


def test_the_default_dtype_is_what_the_machine_has(tiny_llama):
    from qlora_kit.device import choose_compute_dtype, get_device

    loaded = load_quantized(tiny_llama)
    assert loaded.base.compute_dtype == choose_compute_dtype(None, get_device())


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_sixteen_bit_weights_are_the_files_own(tiny_llama, dtype):
    import torch
    from safetensors.torch import load_file

    loaded = load_quantized(tiny_llama, dtype=dtype, load_in_4bit=False)
    stored = load_file(tiny_llama / "model.safetensors")
    weight = _layer(loaded).weight
    assert weight.dtype is {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    expected = stored["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weight.to(torch.bfloat16).cpu(), expected)
    assert loaded.base.quantization is None


def test_eight_bit_turns_four_bit_off(tiny_llama):
    import torch
    from bitsandbytes.nn import Linear8bitLt

    loaded = load_quantized(tiny_llama, load_in_8bit=True)
    assert isinstance(_layer(loaded), Linear8bitLt)
    assert loaded.base.quantization == "int8"
    assert torch.isfinite(logits_of(loaded.model)).all()
    with pytest.raises(ConfigError, match="choose one"):
        load_quantized(tiny_llama, load_in_4bit=True, load_in_8bit=True)


def test_a_prequantized_checkpoint_stays_as_it_is(tiny_llama, tmp_path):
    import torch

    first = load_quantized(tiny_llama, dtype="float32")
    first.model.save_pretrained(tmp_path / "nf4")
    first.tokenizer.save_pretrained(tmp_path / "nf4")
    again = load_quantized(tmp_path / "nf4", dtype="float32", load_in_4bit=False)
    assert again.base.is_prequantized
    assert again.base.quantization == "nf4"
    assert torch.equal(logits_of(first.model), logits_of(again.model))
    # All of it in the dtype that was asked for, not only what is no weight.
    other = load_quantized(tmp_path / "nf4", dtype="bfloat16", load_in_4bit=False)
    floats = {p.dtype for p in other.model.parameters() if p.is_floating_point()}
    assert floats == {torch.bfloat16} == {_layer(other).compute_dtype}


def test_loading_touches_no_network(tiny_llama, no_network, monkeypatch):
    # The environment's own offline switch must not be what keeps us off the network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load_quantized(tiny_llama)
    with pytest.raises(OfflineError, match="local_files_only=False"):
        load_quantized("someone/some-model")
    assert no_network == []
    with pytest.raises(ModelNotFoundError, match="could not be downloaded"):
        load_quantized("someone/some-model", local_files_only=False)
    assert no_network, "the guard saw nothing, so it proves nothing"


def test_a_saved_adapter_finds_its_base(tiny_llama, tmp_path):
    import torch

    model = attach_lora(load_quantized(tiny_llama, dtype="float32"), r=4, lora_alpha=8)
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model.model)
    for is_trainable in (True, False):
        again = load_quantized(tmp_path / "adapter", dtype="float32", is_trainable=is_trainable)
        assert again.adapter.r == 4
        assert (again.trainable_parameters > 0) is is_trainable
        assert torch.equal(logits_of(again.model), expected)


def test_an_adapter_trained_with_a_formatter_from_elsewhere_loads(tiny_llama, tmp_path, caplog):
    from qlora_kit import export_model, generate_stream
    from qlora_kit.data import FormatterBase, Segment

    class QuestionFormatter(FormatterBase):
        name = "question"
        roles = ("question", "answer")

        def segments(self, row):
            return [Segment(row["question"]), Segment(row["answer"], is_trained=True)]

    model = attach_lora(load_quantized(tiny_llama, dtype="float32"), r=2)
    end = model.tokenizer.convert_ids_to_tokens(9)
    model.record.formatter = QuestionFormatter(model.tokenizer, eos_token=end)
    export_model(model, "lora", tmp_path / "adapter")
    again = load_quantized(tmp_path / "adapter")
    assert again.record.formatter is None
    assert "kind 'question' cannot be rebuilt" in caplog.text
    # The answers still end where it ended them.
    assert again.base.stop_token_ids == (*model.base.stop_token_ids, 9)
    assert list(generate_stream(again, "Say", max_new_tokens=2))


def test_a_base_is_looked_up_at_its_own_revision(tiny_llama, tmp_path):
    hub = tmp_path / "hub"

    def put(name, revision, folder):
        repository = hub / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text(revision)

    def load(name, revision):
        return load_quantized(name, dtype="float32", revision=revision, cache_dir=hub)

    for base, base_revision in (("some/base", None), ("some/other", "v2")):
        put(base, base_revision or "main", tiny_llama)
        folder = tmp_path / base
        attach_lora(load(base, base_revision), r=2).model.save_pretrained(folder)
        config_path = folder / "adapter_config.json"
        config = json.loads(config_path.read_text())
        assert config["revision"] == base_revision
        config_path.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        put(f"{base}-adapter", "v1", folder)
        assert load(f"{base}-adapter", "v1").base.name_or_path == base
        assert load(folder, None).base.name_or_path == base
        # An adapter that is a folder has no revisions: the one asked for is the base's.
        with pytest.raises(OfflineError, match=base):
            load(folder, "v3")


def test_an_adapter_without_its_base_says_what_is_missing(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "/gone/away/model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFoundError, match=r"no adapter_model\.safetensors"):
        load_quantized(folder)
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="/gone/away/model"):
        load_quantized(folder)


def test_a_base_named_by_a_relative_path_is_found_from_anywhere(tiny_llama, tmp_path, monkeypatch):
    from qlora_kit import export_model

    monkeypatch.chdir(tiny_llama.parent)
    model = attach_lora(load_quantized("llama", dtype="float32"), r=2)
    export_model(model, "lora", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert load_quantized("adapter").base.name_or_path == str(tiny_llama)


def test_adapters_that_do_not_fit_are_refused(tiny_llama, tiny_qwen3, tmp_path):
    from safetensors.torch import load_file, save_file

    model = attach_lora(load_quantized(tiny_llama, dtype="float32"), r=4)
    model.model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    config_path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    # Of another base.
    config_path.write_text(json.dumps({**config, "base_model_name_or_path": str(tiny_qwen3)}))
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        load_quantized(tmp_path / "adapter")
    # Half of it missing: peft alone would go on with random weights.
    config_path.write_text(json.dumps(config))
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if "layers.0" in name}, weights)
    with pytest.raises(UnsupportedModelError, match=r"lacks \d+ tensors.*layers\.1"):
        load_quantized(tmp_path / "adapter")
    weights.write_bytes(b"nothing")
    with pytest.raises(UnsupportedModelError, match="damaged"):
        load_quantized(tmp_path / "adapter")
    config_path.write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING"):
        load_quantized(tmp_path / "adapter")


def test_missing_paths_name_what_is_near(tiny_llama):
    with pytest.raises(ModelNotFoundError, match="/llama'\\?"):
        load_quantized(tiny_llama.parent / "lama")
    with pytest.raises(FileNotFoundError):
        load_quantized("./no/such/folder")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        load_quantized(tiny_llama / "config.json")
    with pytest.raises(ConfigError, match="empty"):
        load_quantized("")


def test_folders_without_a_model_are_refused(tiny_llama, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*notes\.txt"):
        load_quantized(tmp_path)
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors"):
        load_quantized(tmp_path)
    shutil.copy(tiny_llama / "model.safetensors", tmp_path)
    with pytest.raises(ModelNotFoundError, match="tokenizer"):
        load_quantized(tmp_path)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop_a_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _halve_a_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:64].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _list_a_shard(path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": path.name}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def _set_type(path, value):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": value, "architectures": ["Other"]}))


@pytest.mark.parametrize(
    ("file", "damage", "error", "said"),
    [
        ("model.safetensors", _cut, UnsupportedModelError, "damaged or cut short"),
        ("model.safetensors", _drop_a_tensor, UnsupportedModelError, "layers.1.mlp.up_proj"),
        ("model.safetensors", _halve_a_tensor, UnsupportedModelError, r"\(64, 64\), not \(128"),
        ("model.safetensors", _list_a_shard, ModelNotFoundError, "lacks 1 of the 2 weight files"),
        ("config.json", _cut, UnsupportedModelError, "not JSON"),
        ("config.json", lambda p: p.write_text("[]"), UnsupportedModelError, "no JSON object"),
        ("config.json", lambda p: _set_type(p, "nonesuch"), UnsupportedModelError, "nonesuch"),
        ("config.json", lambda p: _set_type(p, "t5"), UnsupportedModelError, "causal"),
        ("tokenizer.json", _cut, ModelNotFoundError, "no tokenizer"),
    ],
)
def test_damaged_checkpoints_are_refused(tiny_llama, tmp_path, file, damage, error, said):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    damage(folder / file)
    with pytest.raises(error, match=said):
        load_quantized(folder)


def test_an_nf4_checkpoint_without_its_scales_is_refused(tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    load_quantized(tiny_llama, engine="native").model.save_pretrained(tmp_path / "nf4")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "nf4")
    path = tmp_path / "nf4" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="Download the model again"):
        load_quantized(tmp_path / "nf4")


@pytest.mark.parametrize("name", [3, None, "x" * 5000, "a\0b"])
def test_names_that_cannot_be_are_errors_of_ours(name):
    with pytest.raises(QloraKitError):
        load_quantized(name)


def test_flags_are_true_or_false(tiny_llama):
    with pytest.raises(ConfigError, match="load_in_4bit must be True or False, got 'yes'"):
        load_quantized(tiny_llama, load_in_4bit="yes")


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_four_bit_weights_bit_for_bit(tiny_llama, training):
    """On CPUs with AVX512-BF16, bitsandbytes would repack them in place and round scales."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from qlora_kit import generate_stream

    def weights():
        return {
            name: dequantize_4bit(module.weight.data, module.weight.quant_state)
            for name, module in model.model.named_modules()
            if isinstance(module, Linear4bit)
        }

    model = load_quantized(tiny_llama, dtype="bfloat16")
    if training:
        model = attach_lora(model, r=2)
    before = weights()
    list(generate_stream(model, "Say the number", max_new_tokens=4))
    after = weights()
    assert len(before) == 14
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("length", [0, -5, 2.5, True])
def test_impossible_lengths_are_refused(tiny_llama, length):
    with pytest.raises(ConfigError, match="max_seq_length"):
        load_quantized(tiny_llama, max_seq_length=length)


def test_lengths_beyond_the_positions_warn(tiny_llama, caplog):
    load_quantized(tiny_llama, max_seq_length=4096)
    assert "beyond the 512 positions" in caplog.text
    caplog.clear()
    # Nobody gave the default, and whoever exports or generates has nothing to do about it.
    load_quantized(tiny_llama)
    assert "positions" not in caplog.text


def test_unknown_dtypes_and_engines_are_refused(tiny_llama):
    with pytest.raises(ConfigError, match="float8"):
        load_quantized(tiny_llama, dtype="float8")
    with pytest.raises(ConfigError, match="Did you mean 'native'"):
        load_quantized(tiny_llama, engine="nativ")


def test_other_quantizations_are_refused(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="gptq"):
        load_quantized(tmp_path / "gptq")


def test_four_bit_without_bitsandbytes_says_the_way_out(tiny_llama, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MissingDependencyError, match="load_in_4bit=False"):
        load_quantized(tiny_llama)
    assert load_quantized(tiny_llama, load_in_4bit=False).base.quantization is None


def test_auto_logs_which_engine_and_why(tiny_llama, caplog):
    with caplog.at_level("INFO"):
        assert load_quantized(tiny_llama).engine.name == "native"
    assert "Engine 'native': " in caplog.text


def test_what_the_classic_script_passes_besides_is_taken(tiny_llama):
    """Every default of ``FastLanguageModel.from_pretrained``."""
    loaded = load_quantized(
        model_name=tiny_llama, max_seq_length=64, dtype=None, load_in_4bit=True,
        load_in_8bit=False, load_in_16bit=False, full_finetuning=False, token=None,
        device_map_planner_kwargs=None, rope_scaling=None, fix_tokenizer=True,
        trust_remote_code=False, use_gradient_checkpointing="unsloth", resize_model_vocab=None,
        revision=None, use_exact_model_name=False, float32_mixed_precision=None,
        fast_inference=False, gpu_memory_utilization=0.5, float8_kv_cache=False,
        random_state=3407, max_lora_rank=64, disable_log_stats=True, qat_scheme=None,
        load_in_fp8=False, unsloth_tiled_mlp=False, text_only=False,
    )  # fmt: skip
    assert loaded.base.quantization == "nf4"


@pytest.mark.parametrize(
    ("argument", "value", "advice"),
    [
        ("load_in_16bit", True, "load_in_4bit=False"),
        ("full_finetuning", True, "modules_to_save"),
        ("fast_inference", True, "Export the model"),
        ("torch_dtype", "bfloat16", "dtype"),
        ("use_gradient_checkpointing", True, "attach_lora"),
        ("load_in_4bits", True, "Did you mean 'load_in_4bit'"),
    ],
)
def test_what_is_not_taken_says_where_it_belongs(tiny_llama, argument, value, advice):
    with pytest.raises(ConfigError) as caught:
        load_quantized(tiny_llama, **{argument: value})
    assert advice in str(caught.value)
    assert f"{argument}" in str(caught.value)


# -- what a saved model remembers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_llama, alpaca_rows, tmp_path_factory):
    """A run with a checkpoint, trained on a template of its own, and exports of it."""
    from qlora_kit import AlpacaFormatter, export_model, train_sft

    folder = tmp_path_factory.mktemp("remembering")
    model = attach_lora(load_quantized(tiny_llama, 128, "float32"), r=4)
    formatter = AlpacaFormatter(model.tokenizer, "F: {instruction} {input}\nA: {output}")
    train_sft(
        model, formatter.load(alpaca_rows), output_dir=folder / "run", max_steps=2, plan=False,
        save_strategy="steps", save_steps=1, disable_tqdm=True,
    )  # fmt: skip
    export_model(model, ["lora", "merged_16bit", "merged_4bit"], folder, verify=False)
    return folder


@pytest.mark.parametrize("name", ["lora", "merged_16bit", "merged_4bit", "run/checkpoint-1"])
def test_every_export_and_checkpoint_remembers_its_formatter(exported, name, tmp_path):
    import shutil

    # Copied away from the run's own manifest.
    shutil.copytree(exported / name, tmp_path / "copy")
    again = load_quantized(tmp_path / "copy", dtype="float32")
    assert again.record.formatter.prompt("Say.", "x") == "F: Say. x\nA: "
    assert again.record.formatter.tokenizer is again.tokenizer


def test_the_folder_of_a_run_names_the_models_in_it(exported):
    with pytest.raises(ModelNotFoundError, match="holds checkpoint-1, checkpoint-2; give the path"):
        load_quantized(exported / "run")


def test_a_gguf_file_of_an_export_remembers_and_its_neighbour_does_not(exported, tmp_path):
    import shutil

    pytest.importorskip("gguf")
    from qlora_kit import export_model

    export_model(
        load_quantized(exported / "lora", dtype="float32"), "gguf", tmp_path / "out",
        quantization="f16", verify=False,
    )  # fmt: skip
    (file,) = (tmp_path / "out").glob("*.gguf")
    options = {"dtype": "float32", "load_in_4bit": False, "cache_dir": tmp_path / "cache"}
    again = load_quantized(file, **options)
    assert again.record.formatter.prompt("Say.", "x") == "F: Say. x\nA: "
    other = shutil.copy(file, tmp_path / "out" / "other.gguf")
    assert load_quantized(other, **options).record.formatter is None


def test_an_adapter_on_a_merged_export_speaks_for_itself(exported, tmp_path):
    from qlora_kit import export_model

    model = attach_lora(load_quantized(exported / "merged_16bit", dtype="float32"), r=4)
    model.record.formatter = None
    export_model(model, "lora", tmp_path / "out", verify=False)
    assert load_quantized(tmp_path / "out", dtype="float32").record.formatter is None


def test_a_damaged_manifest_is_said_and_ignored(exported, tmp_path, caplog):
    import shutil

    folder = shutil.copytree(exported / "merged_16bit", tmp_path / "copy")
    for damaged in ("{", "[]", '{"formatter": {"kind": 5, "eos_token": []}, "base": "x"}'):
        caplog.clear()
        (folder / "qlora_kit_manifest.json").write_text(damaged, encoding="utf-8")
        assert load_quantized(folder, dtype="float32").record.formatter is None
        assert "is ignored" in caplog.text or "is not here" in caplog.text


def test_tokens_without_an_embedding_are_said_at_loading(tiny_llama, tmp_path, caplog):
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    load_quantized(folder, 64, "float32", load_in_4bit=False)
    assert (
        f"no embedding for, such as '[PAD]' (id {rows}; the model has {rows} rows)" in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("generation_config.json", "{", "generation_config.json is damaged: it is not JSON"),
        ("generation_config.json", '{"eos_token_id": [[1]]}', "its eos_token_id is"),
        ("model.safetensors.index.json", "{}", "does not name a file for each tensor"),
    ],
)
def test_files_beside_the_weights_that_would_be_passed_over_are_refused(
    tiny_llama, tmp_path, name, text, said
):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / name).write_text(text)
    with pytest.raises(UnsupportedModelError, match=said):
        load_quantized(copy, 64, load_in_4bit=False)


@pytest.mark.parametrize("places", [{"": "nope"}, {"": 99}, "x", [], {5: "cpu"}])
def test_a_device_that_there_is_not_is_no_fault_of_the_checkpoint(tiny_llama, places):
    with pytest.raises(ConfigError, match="device_map") as caught:
        load_quantized(tiny_llama, 64, "float32", False, engine="native", device_map=places)
    assert caught.value.parameter == "device_map"
