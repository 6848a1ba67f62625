"""What a file says of where it comes from, and which of its tokens are control tokens."""

from __future__ import annotations

import copy

import pytest

import gguf_tiny as tiny
import qlora_kit
from gguf_llamacpp import Llama, log_lines
from qlora_kit.exporters.gguf.conversion.origin import describe_size
from qlora_kit.exporters.gguf.tokenizer.vocabulary import CONTROL, USER_DEFINED, read_vocabulary
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile

torch = pytest.importorskip("torch")

CARD = """---
license: other
license_name: acorn
license_link: LICENSE
language:
- en
- no
tags: [oak]
pipeline_tag: text-generation
---
# Acorn
"""


def test_files_say_what_they_were_made_of(tmp_path):
    base = tmp_path / "Acorn-1M"
    model = tiny.make_model(tiny.make_config("llama"))
    tiny.save_checkpoint(model, tiny.byte_level_tokenizer(), base)
    (base / "README.md").write_text(CARD)
    adapted = qlora_kit.attach_lora(
        qlora_kit.load_quantized(base, 64, "float32", load_in_4bit=False, engine="native"), r=4
    )
    done = qlora_kit.export_model(adapted, ["gguf", "gguf-lora"], tmp_path / "out")
    for artifact, kind in ((done["gguf"], "model"), (done["gguf-lora"], "adapter")):
        (path,) = (entry.name for entry in artifact.files if entry.name.endswith(".gguf"))
        file = GgufFile(artifact.path / path)
        said = {
            key: file.value(f"general.{key}")
            for key in (
                "type", "license", "license.name", "license.link", "tags", "languages",
                "base_model.count", "base_model.0.name", "quantization_version",
            )
        }  # fmt: skip
        assert said == {
            "type": kind,
            "license": "other",
            "license.name": "acorn",
            "license.link": "LICENSE",
            "tags": ["oak", "text-generation"],
            "languages": ["en", "no"],
            "base_model.count": 1,
            "base_model.0.name": "Acorn-1M",
            "quantization_version": 2,
        }
        sizes = [(name, file.shape(name)) for name in file.tensors]
        if kind == "model":
            assert file.value("general.size_label") == describe_size(sizes) == "1.4M"
        else:
            assert file.value("general.size_label") == "1.2M"


def test_the_size_counts_one_expert_for_all():
    tensors = [("blk.0.ffn_up_exps.weight", (8, 1000, 2000)), ("output.weight", (1000, 3000))]
    assert describe_size(tensors) == "8x5.0M"
    assert describe_size(tensors[1:]) == "3.0M"


def test_tokens_that_look_like_control_tokens_are_written_as_such(tmp_path):
    """As llama.cpp's converter has it; its runtime calls others a probable bug in the model."""
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    control = ["<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<unused7>", "[@BOS@]", "<mask>"]
    plain = ["<tool_call>", "<think>", "|x|>"]
    tokenizer.add_tokens(control + plain)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert {kinds[token] for token in control} == {CONTROL}
    assert {kinds[token] for token in plain} == {USER_DEFINED}
    model = tiny.make_model(tiny.make_config("llama", vocabulary=len(tokenizer)))
    base = tiny.save_checkpoint(model, tokenizer, tmp_path / "base")
    loaded = qlora_kit.load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    done = qlora_kit.export_model(qlora_kit.attach_lora(loaded, r=1), "gguf", tmp_path / "out")
    with Llama(done.path / done.facts["files"]["q8_0"]):
        assert not [line for line in log_lines if "control-looking" in line]
