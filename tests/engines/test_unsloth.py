"""The unsloth engine runs the whole pipeline, held against plain libraries in this process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "unsloth_pipeline.py"
IDS = [[5, 6, 7, 8, 9, 40, 41, 300]]


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """What one process saw: importing unsloth takes longer than everything else here."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed (the extra qlora-kit[unsloth])")
    folder = tmp_path_factory.mktemp("unsloth")
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
    return {**seen, "folder": folder}


def test_unsloth_is_imported_only_when_it_was_chosen(run):
    assert run["imported_early"] is False
    assert run["engine"] == "unsloth"
    assert "Engine 'unsloth': asked for by name." in run["messages"]
    assert "unsloth" not in sys.modules


def test_the_base_is_the_one_native_loads(run, tiny_llama):
    import torch

    from qlora_kit import load_quantized

    assert run["quantization"] == "nf4"
    assert run["stop_token_ids"] == [2]
    native = load_quantized(tiny_llama, 128, "float32", engine="native")
    with torch.no_grad():
        expected = native.model.eval()(torch.tensor(IDS)).logits[0]
    torch.testing.assert_close(torch.tensor(run["base_logits"]), expected, atol=2e-3, rtol=1e-3)


def test_training_learns_what_native_learns(run, tiny_llama, alpaca_rows, tmp_path):
    from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft

    model = attach_lora(load_quantized(tiny_llama, 128, "float32", engine="native"), r=4)
    assert run["trainable"] == model.trainable_parameters
    native = train_sft(
        model, AlpacaFormatter(model.tokenizer).load(alpaca_rows), max_steps=6,
        output_dir=tmp_path, learning_rate=2e-2, warmup_steps=1, disable_tqdm=True,
        optim="adamw_torch", save_strategy="no", plan=False,
    )  # fmt: skip
    assert run["losses"][-1] < 0.97 * run["losses"][0]
    assert run["losses"][0] == pytest.approx(native.losses[0], rel=1e-3)
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


@pytest.mark.parametrize("what", ["loftq", "use_dora", "rank_pattern", "plan"])
def test_what_unsloth_would_ignore_is_refused_with_the_way_out(run, what):
    assert "engine='native'" in run["refused"][what]


def test_native_says_when_unsloth_has_patched_the_libraries(run):
    warned = [text for level, text in run["native_after"] if level == "WARNING"]
    assert warned
    assert all("unsloth is already imported" in text for text in warned)


def test_auto_takes_native_without_a_gpu_and_says_why(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where auto takes unsloth")
    assert run["auto"] == "native"
    assert any("no GPU that unsloth supports" in text for _, text in run["native_after"])
