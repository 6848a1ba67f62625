"""Adapters' folders as other tools write them, through everything that is done with an adapter.

Each cell of the table is right against plain transformers and peft in float32, or refused by name.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adapter_folders import TEMPLATE, TOOLS, copy_changed, load_plain_adapter, load_plain_base
from exported import load_plain
from forward import logits_of
from qlora_kit import export_model, generate_stream, load_quantized
from qlora_kit.errors import UnsupportedModelError

#: What llama.cpp's --lora has no place for, and cannot be asked for.
REFUSED = {
    ("axolotl", "gguf-lora"): "modules_to_save",
    ("trl, token added", "gguf-lora"): "modules_to_save, .*tokens trained alone",
    ("llama-factory", "gguf-lora"): "DoRA, embeddings of its own",
}

#: The cells that every run of the suite takes; the others take a minute together.
QUICK = {
    ("trl", "load"),
    ("trl", "generate"),
    ("axolotl", "load"),
    ("llama-factory", "lora"),
    ("unsloth", "merged_16bit"),
}


@dataclasses.dataclass
class Case:
    """A folder, what it holds in plain peft, and the same in this library."""

    folder: Path
    base: Path
    rows: int | None
    plain: Any
    ours: Any


@pytest.fixture(scope="module")
def cases(tiny_llama, tmp_path_factory):
    made = {}

    def make(tool):
        if tool not in made:
            write, rows = TOOLS[tool]
            folder = tmp_path_factory.mktemp("tools") / "adapter"
            write(tiny_llama, folder)
            plain = load_plain_adapter(tiny_llama, folder, rows)
            made[tool] = Case(
                folder, tiny_llama, rows, plain, load_quantized(folder, 64, "float32", False)
            )
        return made[tool]

    return make


def merge_plain(case, dtype):
    """peft's own merge, rounded to what the export is stored in, computing in float32."""
    import torch

    model = load_plain_adapter(case.base, case.folder, case.rows).merge_and_unload()
    return model.to(dtype).to(torch.float32).eval()


def check_load(case, path, caplog):
    import torch

    assert torch.equal(logits_of(case.ours.model), logits_of(case.plain))


def check_generate(case, path, caplog):
    """Asked with the template beside the adapter, up to its end token."""
    import torch
    from transformers import AutoTokenizer

    beside = case.folder if (case.folder / "tokenizer.json").is_file() else case.base
    tokenizer = AutoTokenizer.from_pretrained(str(beside))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 5."}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert case.ours.tokenizer.eos_token_id == tokenizer.eos_token_id
    ends = {tokenizer.eos_token_id, case.plain.generation_config.eos_token_id}
    assert set(case.ours.stop_token_ids) == ends
    with torch.no_grad():
        answer = case.plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
            do_sample=False, eos_token_id=sorted(ends), pad_token_id=0,
        )  # fmt: skip
    expected = tokenizer.decode(
        [token for token in answer[0, ids.shape[1] :].tolist() if token not in ends]
    )
    chunks = generate_stream(case.ours, prompt, max_new_tokens=8, do_sample=False)
    assert "".join(chunk.text for chunk in chunks) == expected


def check_lora(case, path, caplog):
    import torch

    export_model(case.ours, "lora", path, verify="full")
    again = load_plain_adapter(case.base, path, case.rows)
    assert torch.equal(logits_of(again), logits_of(case.plain))


def check_merged_16bit(case, path, caplog):
    import torch

    export_model(case.ours, "merged_16bit", path, verify="full")
    expected = logits_of(merge_plain(case, torch.bfloat16))
    written = logits_of(load_plain(path, dtype=torch.float32))
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-5)


def check_merged_4bit(case, path, caplog):
    """As if transformers had quantized peft's merge while loading it."""
    import torch
    from transformers import BitsAndBytesConfig

    export_model(case.ours, "merged_4bit", path, verify="full")
    merge_plain(case, torch.bfloat16).to(torch.bfloat16).save_pretrained(path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = load_plain(path / "plain", quantization_config=settings, dtype=torch.bfloat16)
    written = load_plain(path, dtype=torch.bfloat16)
    assert torch.equal(logits_of(written), logits_of(expected))


def check_gguf(case, path, caplog):
    """In llama.cpp itself."""
    import torch

    from gguf_llamacpp import Llama

    export_model(case.ours, "gguf", path, quantization="f32", dtype="float32", name="out")
    ids = [5, 6, 7, 8, 9, 40, 41, 300]
    with Llama(next(path.glob("*.gguf"))) as llama:
        written = torch.tensor(llama.logits(ids))
    expected = logits_of(merge_plain(case, torch.float32), [ids])[0]
    torch.testing.assert_close(written, expected[: len(written)], atol=2e-3, rtol=1e-3)


def check_gguf_lora(case, path, caplog):
    """On the base in llama.cpp itself."""
    import torch

    from gguf_llamacpp import Llama

    export_model(case.ours, "gguf-lora", path / "lora")
    # llama.cpp would ask in the base's words.
    is_own = case.ours.tokenizer.chat_template == TEMPLATE
    assert ("this adapter was trained with its own" in caplog.text) is is_own
    base = load_quantized(case.base, 64, "float32", False)
    export_model(base, "gguf", path / "base", quantization="f32", dtype="float32")
    ids = [5, 6, 7, 8, 9, 40, 41, 300]
    lora = next((path / "lora").glob("*.gguf"))
    with Llama(next((path / "base").glob("*.gguf")), lora=lora) as llama:
        written = torch.tensor(llama.logits(ids))
    expected = logits_of(case.plain, [ids])[0]
    torch.testing.assert_close(written, expected, atol=2e-3, rtol=1e-3)
    # The adapter does something.
    assert not torch.allclose(expected, logits_of(load_plain_base(case.base), [ids])[0], atol=0.01)


CHECKS = {
    "load": check_load,
    "generate": check_generate,
    "lora": check_lora,
    "merged_16bit": check_merged_16bit,
    "merged_4bit": check_merged_4bit,
    "gguf": check_gguf,
    "gguf-lora": check_gguf_lora,
}


@pytest.mark.parametrize(
    ("tool", "use"),
    [
        pytest.param(tool, use, marks=() if (tool, use) in QUICK else pytest.mark.slow)
        for tool in TOOLS
        for use in CHECKS
    ],
)
def test_every_tools_adapter_is_right_or_refused_by_name(cases, tmp_path, caplog, tool, use):
    caplog.set_level("INFO")
    reason = REFUSED.get((tool, use))
    if reason is None:
        CHECKS[use](cases(tool), tmp_path / "out", caplog)
        return
    with pytest.raises(UnsupportedModelError, match=reason):
        CHECKS[use](cases(tool), tmp_path / "out", caplog)


@pytest.mark.slow
def test_an_adapter_on_a_base_in_4_bits_only_is_right(tiny_llama, tmp_path):
    """As Unsloth's users have it, whose base is a repository ending in -bnb-4bit."""
    import torch
    from peft import PeftModel

    base = load_quantized(tiny_llama, 64, "float32", False)
    export_model(base, "merged_4bit", tmp_path / "model-bnb-4bit")
    TOOLS["unsloth"][0](tiny_llama, tmp_path / "written")
    nf4 = str(tmp_path / "model-bnb-4bit")
    folder = copy_changed(tmp_path / "written", tmp_path / "lora", base_model_name_or_path=nf4)
    plain = load_plain(nf4, dtype=torch.float32)
    for module in plain.modules():
        if hasattr(module, "compute_dtype"):
            # Else bitsandbytes computes in the bfloat16 of the file, and rounds the scales to it.
            module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
    expected = logits_of(PeftModel.from_pretrained(plain, str(folder)))
    ours = load_quantized(folder, 64, "float32")
    assert ours.base.is_prequantized
    torch.testing.assert_close(logits_of(ours.model), expected, atol=1e-5, rtol=1e-5)
    export_model(ours, "lora", tmp_path / "again", verify="full")
    assert torch.equal(logits_of(load_quantized(tmp_path / "again", 64, "float32").model),
                       logits_of(ours.model))  # fmt: skip
    export_model(ours, "merged_16bit", tmp_path / "merged", verify="full")
    merged = logits_of(load_plain(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, expected, atol=0.02, rtol=0.02)
