"""Tokenizers and models small enough to make on the spot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|end|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<pad>"]
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nSay hello.\n\n### Response:\nHello, world!\n",
    "user assistant system The quick brown fox jumps over the lazy dog. 0123456789",
    "下面是一条描述任务的指令。请写出恰当完成该请求的回答。你好，世界！",
]


def make_tokenizer(kind: str) -> Any:
    """A tokenizer of one of the kinds that exist in the wild.

    ``bytes``: byte-level BPE, padding is the end token, nothing added around a text (Qwen,
    SmolLM). ``bos``: the same with a beginning token and its own padding (Llama 3).
    ``metaspace``: BPE with a mark at the beginning of a text and byte fallback (Llama 2).
    ``words``: whole words, whose vocabulary holds the special tokens as words.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    if kind in ("bytes", "bos"):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(CORPUS, trainer)
        if kind == "bos":
            bos = core.token_to_id("<|bos|>")
            core.post_processor = processors.TemplateProcessing(
                single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
            )
            options |= {"bos_token": "<|bos|>", "pad_token": "<pad>"}
    elif kind == "metaspace":
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
        core.train_from_iterator([" ".join(CORPUS).replace("\n", " ")], trainer)
        state = json.loads(core.to_str())
        state["added_tokens"] = [
            token for token in state["added_tokens"] if not token["content"].startswith("<0x")
        ]
        core = Tokenizer.from_str(json.dumps(state))
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        bos = core.token_to_id("<|bos|>")
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
        )
        options |= {"bos_token": "<|bos|>", "unk_token": "<unk>", "pad_token": "<pad>"}
    else:
        words = " ".join(CORPUS).split()
        vocabulary = {
            word: index for index, word in enumerate(dict.fromkeys(["<unk>", *SPECIALS, *words]))
        }
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
        options |= {"unk_token": "<unk>", "additional_special_tokens": SPECIALS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """One tokenizer of each kind."""
    return {kind: make_tokenizer(kind) for kind in ("bytes", "bos", "metaspace", "words")}


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, Any]) -> Any:
    """Byte-level BPE whose padding token is its end token."""
    return tokenizers["bytes"]


def make_model(shape: str, vocabulary: int = 512, attention: str = "sdpa") -> Any:
    """A random float32 model of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attn_implementation": attention,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    if shape == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16))
    return model.float()


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a model computes: the CPU, and a GPU where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real Alpaca rows, or a skip that says where it was looked for."""
    here = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("QLORA_KIT_SHARED_DATA", here.parent / "shared" / "data"))
    files = [folder / f"alpaca_{language}_demo.json" for language in ("en", "zh")]
    if not all(file.is_file() for file in files):
        pytest.skip(f"no shared rows in {folder}; set QLORA_KIT_SHARED_DATA")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
