"""Checkpoints of known shapes with random 16-bit weights, written as fast as memory allows.

All layers hold the same numbers, which no kernel's speed depends on: drawing 70 billion of them
would take longer than the benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rope_theta": 1e6, "max_position_embeddings": 40960,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "qwen3-32b": {
        **_QWEN3, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "tie_word_embeddings": False,
    },
    "llama-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "tiny": {
        **_QWEN3, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

_THREADS = 16
_BLOCK = 1 << 26


def make_random_model(shape: str, tokenizer: Path, folder: Path) -> None:
    """Write a checkpoint, one file a layer.

    Args:
        shape: A name in :data:`SHAPES`.
        tokenizer: A folder with any tokenizer.
        folder: Where to.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    rows = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    rows.save_pretrained(folder)
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.eos_token_id, config.architectures = rows.eos_token_id, None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if (
        model.config.tie_word_embeddings
    ) else set()  # fmt: skip
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            parts = name.split(".")
            file = f"layer-{int(parts[2]):03}" if parts[1] == "layers" else "rest"
            files.setdefault(f"{file}.safetensors", {})[name] = tuple(tensor.shape)
    numbers: dict[tuple[int, ...], memoryview] = {}
    for size in {size for tensors in files.values() for size in tensors.values()}:
        made = torch.ones(size) if len(size) == 1 else torch.empty(size).normal_(std=0.02)
        flat = made.to(torch.bfloat16).view(torch.uint8).reshape(-1)
        numbers[size] = memoryview(flat.numpy())
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda one: _write(folder / one[0], one[1], numbers), files.items()))
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write(
    path: Path,
    tensors: Mapping[str, tuple[int, ...]],
    numbers: Mapping[tuple[int, ...], memoryview],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in tensors.items():
        end = at + len(numbers[size])
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in tensors.values():
            data = numbers[size]
            for start in range(0, len(data), _BLOCK):
                file.write(data[start : start + _BLOCK])
