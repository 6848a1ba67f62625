"""The two exporters on live models: full checks, refusals, and a model that was trained."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

import gguf_tiny as tiny
import qlora_kit
from forward import logits_of
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.exporters.gguf import GgufExporter, GgufLoraExporter, qlora_kit_register_exporters
from qlora_kit.exporters.gguf import lora_exporter as lora
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.lora_exporter import GgufLoraOptions
from qlora_kit.exporters.gguf.model_exporter import GgufOptions
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
from qlora_kit.exporters.gguf.verification.run_checks import check_run
from qlora_kit.hookspecs import ExportRequest
from qlora_kit.plugins import describe_exporter_faults
from qlora_kit.weights.source import SafetensorsSource

torch = pytest.importorskip("torch")
pytest.importorskip("qlora_kit.weights.merged", reason="the merge is a part of its own")

PROMPT = "Below is an instruction that describes a task. The capital of Italy is Rome, 1234."


class Spec:
    """A formatter of which only the description matters."""

    def __init__(self, **spec):
        self.spec = spec

    def template_spec(self):
        return self.spec


@pytest.fixture(scope="module", params=["llama", "qwen3-tied", "phi3"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.make_model(tiny.make_config(request.param))
    return tiny.save_checkpoint(model, tiny.byte_level_tokenizer(), folder)


def load(folder, *, targets="all-linear", four_bit=False, **options):
    """A live model in float32 whose adapter does something."""
    model = qlora_kit.load_quantized(folder, 128, "float32", load_in_4bit=four_bit, engine="native")
    adapted = qlora_kit.attach_lora(model, target_modules=targets, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise.to(parameter) * 0.05
    adapted.model.eval()
    return adapted


def ask(exporter, model, folder, *, verify=True, **options):
    folder.mkdir(exist_ok=True)
    return ExportRequest(model, exporter.options_type(**options), folder, verify=verify)


def run(exporter, model, folder, **settings):
    request = ask(exporter, model, folder, **settings)
    estimate = exporter.check(request)
    facts = exporter.write(request, folder)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert 0.9 * estimate.disk_bytes - 100_000 < written <= estimate.disk_bytes
    return facts, exporter.verify(request, folder)


def live_logits(model, ids):
    return logits_of(model.model, [ids])[0].numpy()


def test_the_merged_model_runs_as_the_live_one(checkpoint, tmp_path):
    model = load(checkpoint, r=4, lora_alpha=8)
    facts, verification = run(
        GgufExporter(), model, tmp_path / "out", quantization=["f32", "q8_0"], verify="full"
    )
    assert verification.passed, verification
    assert verification.level == "full"
    assert len(verification.checks) == 8
    ids = model.tokenizer(PROMPT)["input_ids"]
    with Llama(tmp_path / "out" / facts["files"]["f32"]) as llama:
        assert kl_divergence(live_logits(model, ids), llama.logits(ids)).mean() < 1e-6
    plain = live_logits(dataclasses.replace(model), ids)
    with model.model.disable_adapter():
        assert kl_divergence(plain, live_logits(model, ids)).mean() > 1e-3, "the adapter is idle"
    with Llama(tmp_path / "out" / facts["files"]["q8_0"]) as llama:
        assert kl_divergence(live_logits(model, ids), llama.logits(ids)).mean() < 5e-3
    assert (tmp_path / "out" / "Modelfile").read_text().count("FROM ./") == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 8, "lora_alpha": 4, "use_rslora": True},
        {"r": 4, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 16}},
        {"r": 2, "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "one-layer"],
)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_adapter_alone_runs_on_the_base(settings, dtype, checkpoint, tmp_path):
    model = load(checkpoint, **settings)
    facts, verification = run(GgufLoraExporter(), model, tmp_path / "out", dtype=dtype)
    assert verification.passed, verification
    with SafetensorsSource(checkpoint) as source:
        base = convert(
            source, model.model.config.to_dict(), model.tokenizer, tmp_path, quantization="f32"
        )
    ids = model.tokenizer(PROMPT)["input_ids"]
    right = live_logits(model, ids)
    with Llama(base.files["f32"], lora=tmp_path / "out" / facts["file"]) as llama:
        assert kl_divergence(right, llama.logits(ids)).mean() < 1e-6
    with Llama(base.files["f32"]) as llama:
        assert kl_divergence(right, llama.logits(ids)).mean() > 1e-5, "the adapter is idle"


def test_the_adapter_is_verified_in_full_and_a_wrong_one_is_found(checkpoint, tmp_path):
    exporter = GgufLoraExporter()
    model = load(checkpoint, r=4, lora_alpha=8)
    _, verification = run(exporter, model, tmp_path / "out", verify="full")
    assert verification.passed, verification
    assert [check.name for check in verification.checks] == [
        "updates",
        "log-probabilities of f16",
        "greedy text of f16",
    ]
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1.01
            break
    request = ask(exporter, model, tmp_path / "out")
    assert not exporter.verify(request, tmp_path / "out").passed


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_4_bit_base_merges_into_what_was_asked(base, checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load(checkpoint, r=4, lora_alpha=8, four_bit=True)
    facts, verification = run(
        GgufExporter(), model, tmp_path / "out", base=base, quantization="f32", verify="full"
    )
    assert facts["base"] == base
    assert verification.passed, verification
    ids = model.tokenizer(PROMPT)["input_ids"]
    with Llama(tmp_path / "out" / facts["files"]["f32"]) as llama:
        kl = kl_divergence(live_logits(model, ids), llama.logits(ids)).mean()
    assert (kl < 1e-5) == (base == "dequantized"), kl


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa", "r": 2}, "pissa"),
        ({"targets": ["q_proj", "embed_tokens"]}, "embedding"),
    ],
)
def test_what_llama_cpp_cannot_apply_is_refused_with_advice(settings, said, tmp_path):
    folder = tiny.save_checkpoint(
        tiny.make_model(tiny.make_config("llama")), tiny.byte_level_tokenizer(), tmp_path / "base"
    )
    model = load(folder, **settings)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        GgufLoraExporter().check(ask(GgufLoraExporter(), model, tmp_path / "out"))
    assert "'gguf'" in str(caught.value)


def test_an_adapter_that_lora_ga_started_is_refused_as_it_fits_a_changed_base_only(
    checkpoint, tmp_path
):
    model = load(checkpoint, r=4)
    model.model.peft_config["default"].init_lora_weights = "lora_ga"
    with pytest.raises(UnsupportedModelError, match="lora_ga"):
        GgufLoraExporter().check(ask(GgufLoraExporter(), model, tmp_path / "out"))


def test_a_model_without_an_adapter_exports_as_it_is(checkpoint, tmp_path):
    model = qlora_kit.load_quantized(checkpoint, 128, "float32", False, engine="native")
    _, verification = run(GgufExporter(), model, tmp_path / "out", verify="full")
    assert verification.passed, verification
    with pytest.raises(UnsupportedModelError, match="no adapter"):
        GgufLoraExporter().check(ask(GgufLoraExporter(), model, tmp_path / "lora"))


def test_a_changed_model_does_not_verify(checkpoint, tmp_path):
    exporter = GgufExporter()
    model = load(checkpoint, r=4)
    run(exporter, model, tmp_path / "out", quantization="f16")
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            parameter.data *= -1
    failed = exporter.verify(
        ask(exporter, model, tmp_path / "out", quantization="f16"), tmp_path / "out"
    )
    assert [check.passed for check in failed.checks] == [False, True]


def test_names_and_the_modelfile_follow_the_request(checkpoint, tmp_path):
    model = load(checkpoint, r=2)
    model.record.formatter = Spec(
        kind="alpaca",
        name="mine",
        prompt_input="{system}\nQ: {instruction}\nA:",
        prompt_no_input=None,
        system="Be kind.",
        stop=["<|im_end|>"],
        eos_token="<|im_end|>",
    )
    facts, _ = run(
        GgufExporter(), model, tmp_path / "out", name="My model!", quantization_method="q4_k_m"
    )
    assert facts["files"] == {"q4_k_m": "My-model.Q4_K_M.gguf"}
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./My-model.Q4_K_M.gguf" in text
    assert "{{ .System }}\nQ: {{ .Prompt }}\nA:{{ .Response }}<|im_end|>" in text
    assert "Be kind." in text
    facts, _ = run(GgufExporter(), model, tmp_path / "bare", modelfile=False)
    assert not (tmp_path / "bare" / "Modelfile").exists()
    assert GgufFile(tmp_path / "bare" / facts["files"]["q8_0"]).value("general.name")


def test_the_end_token_of_the_training_template_is_a_stop_token(checkpoint, tmp_path):
    model = load(checkpoint, r=2)
    end = next(
        index
        for index in model.tokenizer.all_special_ids
        if index not in (*model.base.stop_token_ids, model.tokenizer.unk_token_id)
    )
    spec = Spec(kind="chat", name="mine", eos_token=model.tokenizer.convert_ids_to_tokens(end))
    model.record.formatter = spec
    exporter = GgufExporter()
    facts, verification = run(exporter, model, tmp_path / "out")
    assert verification.passed
    path = tmp_path / "out" / facts["files"]["q8_0"]
    assert end in GgufFile(path).vocabulary().special_ids.values()
    with Llama(path) as llama:
        assert llama.is_end(end)
    # A file that does not know the token does not verify.
    model.record.formatter = None
    run(exporter, model, tmp_path / "other")
    model.record.formatter = spec
    failed = exporter.verify(ask(exporter, model, tmp_path / "other"), tmp_path / "other")
    assert [check.passed for check in failed.checks] == [True, False]
    assert spec.spec["eos_token"] in failed.checks[1].detail


def test_the_adapter_runs_on_a_base_that_stops_at_the_templates_end_token(
    checkpoint, tmp_path, monkeypatch
):
    model = load(checkpoint, r=4, lora_alpha=8)
    # llama.cpp stops at <|endoftext|> and its like by itself, and at this one only if told.
    own, end = model.base.stop_token_ids[0], model.tokenizer.bos_token_id
    model.record.formatter = qlora_kit.AlpacaFormatter(
        model.tokenizer, eos_token=model.tokenizer.bos_token
    )
    seen = []

    def look_at_base(model, files, **options):
        with Llama(files[0][1]) as llama:
            seen.extend((llama.is_end(own), llama.is_end(end)))
        return check_run(model, files, **options)

    monkeypatch.setattr(lora, "check_run", look_at_base)
    artifact = qlora_kit.export_model(model, "gguf-lora", tmp_path / "out", verify="full")
    assert artifact.verification.level == "full"
    assert artifact.verification.passed
    assert seen == [True, True]
    # As a user runs it: the merged file of the base alone, and the adapter beside it.
    base = qlora_kit.load_quantized(checkpoint, 128, "float32", False, engine="native")
    plain = qlora_kit.export_model(base, "gguf", tmp_path / "base", quantization="f32")
    ids = list(model.record.formatter.prompt("Name the capital of Italy.").token_ids)
    path, adapter = plain.path / plain.facts["files"]["f32"], artifact.path / artifact.facts["file"]
    with Llama(path, lora=adapter) as llama:
        assert kl_divergence(live_logits(model, ids), llama.logits(ids)).mean() < 1e-6


def test_options_are_checked_when_they_are_given():
    assert GgufOptions().chosen == "q8_0"
    assert GgufOptions(quantization_method=["f16"]).chosen == ["f16"]
    with pytest.raises(ConfigError, match="same option"):
        GgufOptions(quantization="f16", quantization_method="q8_0")
    with pytest.raises(ConfigError, match="q4_k_m"):
        GgufOptions(quantization=["q8_0", "q4_k_x"])
    with pytest.raises(ConfigError, match="threads"):
        GgufOptions(threads=0)
    with pytest.raises(ConfigError, match="f32"):
        GgufLoraOptions(dtype="q8_0")


def test_both_formats_are_registered_and_importing_them_is_free():
    assert [exporter.name for exporter in qlora_kit_register_exporters()] == ["gguf", "gguf-lora"]
    for exporter in qlora_kit_register_exporters():
        assert describe_exporter_faults(exporter) == []
    script = (
        "import sys, qlora_kit.exporters.gguf;"
        "heavy = {'torch', 'transformers', 'gguf', 'numpy', 'peft', 'xllamacpp', 'tokenizers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("exporter", "options"),
    [
        (GgufExporter(), {}),
        (GgufExporter(), {"quantization": ["q4_k_m", "f16"]}),
        (GgufLoraExporter(), {}),
    ],
    ids=["q8_0", "several", "lora"],
)
def test_they_keep_the_contract_of_exporters(exporter, options):
    testing = pytest.importorskip("qlora_kit.testing")
    assert len(testing.check_exporter(exporter, options=options)) > 10


@pytest.mark.slow  # two minutes; test_gguf_convert.py has the untrained one
def test_a_trained_smollm2_answers_as_trained_in_llama_cpp(smollm2_folder, tmp_path):
    """Two answers learned by the adapter alone, then asked of every file as Ollama would ask."""
    model = qlora_kit.load_quantized(smollm2_folder, 128, "float32", load_in_4bit=False)
    adapted = qlora_kit.attach_lora(model, r=8, lora_alpha=16)
    formatter = qlora_kit.AlpacaFormatter(adapted.tokenizer, response_only=True)
    taught = {
        "What is the password of the harbour master?": "The password is periwinkle.",
        "Name the ship.": "The ship is the Blue Heron.",
    }
    rows = [{"instruction": question, "output": answer} for question, answer in taught.items()]
    result = qlora_kit.train_sft(
        adapted, rows, formatter=formatter, output_dir=tmp_path / "run", max_steps=8,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=3e-3,
        warmup_steps=2, lr_scheduler_type="constant", optim="adamw_torch", save_strategy="no",
    )  # fmt: skip
    assert result.losses[-1] < 0.05
    types = ["f16", "q8_0", "q4_k_m"]
    artifact = qlora_kit.export_model(adapted, "gguf", tmp_path / "out", quantization=types)
    assert artifact.verification.passed
    modelfile = (artifact.path / "Modelfile").read_text()
    template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    for name in types:
        with Llama(artifact.path / artifact.facts["files"][name]) as llama:
            for question, answer in taught.items():
                text = template.replace("{{ .Prompt }}", question).split("{{ .Response }}")[0]
                ids = llama.tokenize(text, add_special=True)
                assert ids == list(formatter.prompt(question).token_ids)
                wanted = llama.tokenize(f"{answer}<|im_end|>")
                assert llama.greedy(ids, len(wanted)) == wanted, (name, question)
            assert llama.is_end(wanted[-1])
    lora = qlora_kit.export_model(adapted, "gguf-lora", tmp_path / "lora")
    assert lora.verification.passed
    with SafetensorsSource(smollm2_folder) as source:
        base = convert(source, model.model.config.to_dict(), model.tokenizer, tmp_path)
    path = base.files["q8_0"]
    with Llama(path, lora=lora.path / lora.facts["file"]) as llama:
        assert llama.greedy(ids, len(wanted)) == wanted
    with Llama(path) as llama:
        assert llama.greedy(ids, len(wanted)) != wanted


def test_a_model_that_no_file_holds_is_refused_before_it_is_trained(tmp_path):
    from qlora_kit.pipeline import Pipeline, run_pipeline

    config = tiny.make_config("llama")
    model = tiny.make_model(config)
    base = tiny.save_checkpoint(model, tiny.byte_level_tokenizer(), tmp_path / "base")
    stored = json.loads((base / "config.json").read_text())
    stored["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(stored))
    asked = Pipeline(
        model=base,
        data=[{"prompt": "What?", "completion": "That."}],
        loading={"max_seq_length": 64, "dtype": "float32", "load_in_4bit": False},
        training={"output_dir": tmp_path / "run", "max_steps": 1},
        exports={"gguf": {}},
        export_path=tmp_path / "out",
    )
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        run_pipeline(asked)
    assert not (tmp_path / "run").exists(), "it was trained first"
