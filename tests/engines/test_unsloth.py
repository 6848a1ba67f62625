"""The unsloth engine runs the whole pipeline, held against plain libraries in this process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unsloth_pipeline

HELPER = Path(unsloth_pipeline.__file__)
IDS = [[5, 6, 7, 8, 9, 40, 41, 300]]


@pytest.fixture(scope="module")
def others(tiny_llama, tmp_path_factory):
    """Checkpoints to refuse, and two whole ones, by name."""
    from safetensors.torch import load_file, save_file

    from qlora_kit import load_quantized

    folder = tmp_path_factory.mktemp("unsloth") / "others"
    stored = load_quantized(tiny_llama, dtype="float32", engine="native")
    stored.model.save_pretrained(folder / "nf4")
    stored.tokenizer.save_pretrained(folder / "nf4")

    def copy(name, source=tiny_llama):
        return shutil.copytree(source, folder / name)

    def edit_config(name, **values):
        path = copy(name) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def drop(name, source):
        path = copy(name, source) / "model.safetensors"
        tensors = load_file(path)
        for tensor in [t for t in tensors if t.startswith("model.layers.1.mlp.up_proj.weight")]:
            del tensors[tensor]
        save_file(tensors, path, metadata={"format": "pt"})

    def cut(name, file):
        path = copy(name) / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    copy("plain")
    cut("cut weights", "model.safetensors")
    cut("cut tokenizer", "tokenizer.json")
    drop("incomplete", tiny_llama)
    drop("incomplete nf4", folder / "nf4")
    edit_config("unknown", model_type="nonesuch", architectures=["Other"])
    edit_config("no causal model", model_type="t5", architectures=["Other"])
    edit_config("gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    return folder


@pytest.fixture(scope="module")
def run(tiny_llama, others):
    """What one process saw: importing unsloth takes longer than everything else here."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed (the extra qlora-kit[unsloth])")
    folder = others.parent
    done = subprocess.run(
        [sys.executable, str(HELPER), str(tiny_llama), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    return {**seen, "folder": folder, "stdout": done.stdout}


def _logits(model, ids=IDS):
    import torch

    with torch.no_grad():
        batch = torch.tensor(ids, device=model.device)
        return model.eval()(batch).logits[0].float().cpu()


def test_unsloth_is_imported_only_when_it_was_chosen(run):
    assert run["imported_early"] is False
    assert run["engine"] == "unsloth"
    assert "Engine 'unsloth': asked for by name." in run["messages"]
    assert "unsloth" not in sys.modules


def test_standard_output_is_left_to_the_program(run):
    assert run["stdout"].splitlines() == [unsloth_pipeline.SAID_BY_CALLBACK] * 6
    # It is in the log instead, what is printed on import, while loading and while training.
    import torch

    if not torch.cuda.is_available():
        said = [text for text in run["messages"] if text.startswith("Unsloth")]
        assert any("no GPU found" in text for text in said)
        assert any("LlamaForCausalLM on" in text for text in said)
        assert sum("optim = 'adamw_8bit' needs a GPU" in text for text in said) == 6
        assert sum("optim = 'lion_8bit' needs a GPU" in text for text in said) == 1


def test_the_base_is_the_one_native_loads(run, tiny_llama):
    import torch

    from qlora_kit import load_quantized

    assert run["quantization"] == "nf4"
    assert run["stop_token_ids"] == [2]
    native = load_quantized(tiny_llama, 128, "float32", engine="native")
    assert run["limits"] == [None, native.tokenizer.model_max_length]
    expected = _logits(native.model)
    torch.testing.assert_close(torch.tensor(run["base_logits"]), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "cut weights", "cut tokenizer", "incomplete", "incomplete nf4", "unknown",
        "no causal model", "gptq",
    ],
)  # fmt: skip
def test_a_checkpoint_is_refused_as_native_refuses_it(run, others, name):
    from qlora_kit import load_quantized
    from qlora_kit.errors import QloraKitError

    with pytest.raises(QloraKitError) as refused:
        load_quantized(others / name, dtype="float32", engine="native")
    assert run["checkpoints"][name] == [type(refused.value).__name__, str(refused.value)]


def test_whole_checkpoints_are_loaded_as_they_were_asked_for(run):
    import torch

    said = run["checkpoints"]
    assert said["plain"] is None
    assert said["nf4"] is None
    assert said["kept"] == "nf4"
    # Its CPU backend replaces float16, which is then said and recorded.
    stated, actual = said["half"]
    assert actual == f"torch.{stated}"
    replaced = any(text.startswith("unsloth computes in") for text in run["messages"])
    assert replaced is (stated != "float16")
    # It would load 16-bit weights and go on.
    assert said["int8"] == ("int8" if torch.cuda.is_available() else "refused")
    assert said["no bitsandbytes"][0] == "MissingDependencyError"
    assert "load_in_4bit=False" in said["no bitsandbytes"][1]


def test_beyond_its_positions_the_model_is_the_one_in_the_files(run, tiny_llama):
    import torch

    from qlora_kit import load_quantized

    assert any("beyond the 512 positions" in text for text in run["messages"])
    assert run["beyond"]["lengths"] == [1024]
    native = load_quantized(tiny_llama, 1024, "float32", load_in_4bit=False, engine="native")
    expected = _logits(native.model, [[5 + n % 300 for n in range(600)]])[-1]
    got = torch.tensor(run["beyond"]["logits"])
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


def test_training_learns_what_native_learns(run, tiny_llama, alpaca_rows, tmp_path):
    import torch

    from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft

    model = attach_lora(load_quantized(tiny_llama, 128, "float32", engine="native"), r=4)
    assert run["trainable"] == model.trainable_parameters
    native = train_sft(
        model, AlpacaFormatter(model.tokenizer).load(alpaca_rows), max_steps=6,
        output_dir=tmp_path, learning_rate=2e-2, warmup_steps=1, disable_tqdm=True,
        optim="adamw_torch", save_strategy="no", plan=False,
    )  # fmt: skip
    assert run["losses"][-1] < 0.97 * run["losses"][0]
    # unsloth's GPU kernels compute in mixed precision.
    first = 2e-2 if torch.cuda.is_available() else 1e-3
    assert run["losses"][0] == pytest.approx(native.losses[0], rel=first)
    # The random starts of A differ, so the paths do a little.
    assert run["losses"] == pytest.approx(list(native.losses), rel=0.05)
    assert run["tokens"] == [native.tokens_seen, native.trained_tokens]


def test_answers_stream_and_change(run):
    before, after = run["answers"]
    assert before != after
    assert after
    assert run["finish_reason"] in ("eos", "length")
    assert run["still_training"] is True


def test_exports_are_checked_and_read_by_plain_libraries(run, tiny_llama):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert "logits" in run["lora"]
    assert {"logits", "merged values"} <= set(run["merged_16bit"])
    assert run["reloaded_trainable"] == 0
    live = torch.tensor(run["trained_logits"])
    torch.testing.assert_close(torch.tensor(run["reloaded_logits"]), live, atol=1e-2, rtol=1e-2)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(run["folder"] / "lora")).eval()
    merged = AutoModelForCausalLM.from_pretrained(
        run["folder"] / "merged_16bit", dtype=torch.float32
    )
    with torch.no_grad():
        expected = adapted(torch.tensor(IDS)).logits[0]
        got = merged(torch.tensor(IDS)).logits[0]
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=1e-2)
    # The adapter says something: without it the logits are far away.
    assert (live - torch.tensor(run["base_logits"])).abs().max() > 0.2


def test_a_stream_leaves_the_model_as_it_found_it(run):
    streams = run["streams"]
    training, checkpointing, *_ = streams["before"]
    assert 0 < sum(training) < len(training), "only the adapters train"
    assert "True" in checkpointing
    assert streams["after"] == [streams["before"]] * 2
    assert streams["warned"] == []


def test_streams_that_overlap_are_computed_one_after_another(run):
    streams = run["streams"]
    alone, during = streams["texts"]
    assert during == alone
    assert alone[0] != alone[1]
    assert streams["turns"] == 1
    assert streams["under_the_other"] == [False, True]


def test_attaching_states_the_revision_and_leaves_the_global_generators_alone(run):
    assert run["start"]["revision"] == "v2"
    left, untouched = run["start"]["drawn"]
    assert left == untouched


@pytest.mark.parametrize("what", ["loftq", "use_dora", "rank_pattern"])
def test_what_unsloth_would_ignore_is_refused_with_the_way_out(run, what):
    assert "engine='native'" in run["refused"][what][1]


def test_a_plan_is_refused_with_the_way_out(run):
    assert "engine='native'" in run["plan_refused"][1]


def test_starts_that_a_quantized_base_cannot_hold_are_refused_as_native_does(run, tiny_llama):
    from qlora_kit import attach_lora, load_quantized
    from qlora_kit.errors import ConfigError

    native = load_quantized(tiny_llama, 128, "float32", engine="native")
    with pytest.raises(ConfigError) as refused:
        attach_lora(native, r=4, init_lora_weights="olora")
    assert run["refused"]["olora"] == ["ConfigError", str(refused.value)]


def test_errors_of_unsloth_are_errors_of_ours(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("on a GPU unsloth imports peft before it attaches anything")
    name, said = run["refused"]["no peft"]
    assert name == "MissingDependencyError"
    assert "peft" in said


def test_native_says_when_unsloth_has_patched_the_libraries(run):
    # What is said of versions outside the tested ones depends on the machine.
    warned = [
        text
        for level, text in run["native_after"]
        if level == "WARNING" and "outside the versions" not in text
    ]
    assert warned
    assert all("unsloth is already imported" in text for text in warned)


def test_auto_takes_native_without_a_gpu_and_says_why(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where auto has a choice")
    assert run["auto"] == "native"
    assert any(text.startswith("Engine 'native': ") for _, text in run["native_after"])
