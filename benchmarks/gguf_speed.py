"""Half of ``gguf_tables.py``: conversions in fresh processes, and ggml's quantizer alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

_HIDDEN, _INNER, _VOCABULARY, _KV = 2048, 5632, 32000, 256
_PIECE = 1 << 20
#: Numbers that ggml alone is timed on, per type.
_SAMPLE = 48 << 20


def measure_speed(
    layers: int, threads: int, types: list[str], scratch: Path | None
) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="qlora_kit-bench-", dir=scratch) as folder:
        print(f"... writing a checkpoint of {layers} layers", file=sys.stderr, flush=True)
        numbers = make_checkpoint(Path(folder), layers)
        for name in types:
            print(f"... {name}", file=sys.stderr, flush=True)
            got = _in_fresh_process(folder, name, str(threads))
            rows.append(_make_row(name, got, threads))
    return {
        "subject": f"A Llama of {numbers / 1e9:.2f} billion random parameters stored in bfloat16; "
        f"{threads} threads. MB are of float32 input. Peak is anonymous memory beyond what the "
        "process held before.",
        "parameters": numbers,
        "threads": threads,
        "rows": rows,
    }


def _make_row(name: str, got: dict[str, Any], threads: int) -> dict[str, Any]:
    alone, alone_cpu = got["alone_seconds"], got["alone_cpu"]
    return {
        "type": name,
        "size GB": round(got["size"] / 1e9, 2),
        "seconds": round(got["seconds"], 1),
        "MB/s per core": round(got["input"] / got["seconds"] / threads / 1e6),
        "ggml alone, s": round(alone, 1) if alone else None,
        "share of ggml": round(alone / got["seconds"], 2) if alone else None,
        "in CPU time": round(alone_cpu / got["cpu"], 2) if alone else None,
        "peak MB": round((got["peak"] - got["before"]) / 1e6),
    }


def make_checkpoint(folder: Path, layers: int) -> int:
    """A random Llama checkpoint, written layer by layer so that any size fits in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(
        num_hidden_layers=layers,
        architectures=["LlamaForCausalLM"],
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=_VOCABULARY,
        max_position_embeddings=2048,
    ).save_pretrained(folder)
    shapes = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (_KV, _HIDDEN),
        "self_attn.v_proj": (_KV, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj": (_INNER, _HIDDEN),
        "mlp.up_proj": (_INNER, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INNER),
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
    }
    generator = torch.Generator().manual_seed(0)
    numbers = 0

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal numbers
        numbers += math.prod(shape)
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    weight_map = {}
    for part in range(layers + 1):
        file = f"model-{part:05d}.safetensors"
        if part < layers:
            names = {f"model.layers.{part}.{name}.weight": shape for name, shape in shapes.items()}
        else:
            names = {
                "model.embed_tokens.weight": (_VOCABULARY, _HIDDEN),
                "lm_head.weight": (_VOCABULARY, _HIDDEN),
                "model.norm.weight": (_HIDDEN,),
            }
        save_file({name: random(shape) for name, shape in names.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return numbers


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


class AnonymousPeak:
    """Samples this process's anonymous memory."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self.read())

    @staticmethod
    def read() -> int:
        # A counter; smaps_rollup walks the page tables, which would take part of the time measured.
        file = Path("/proc/self/status")
        if not file.is_file():
            return 0
        line = next(line for line in file.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


def measure_once(checkpoint: Path, type_name: str, threads: int) -> dict[str, Any]:
    """One conversion in this process, and ggml alone right after it."""
    import gguf  # noqa: F401 - loading packages is not what is measured
    import torch

    from qlora_kit.exporters.gguf.conversion.file_writer import convert
    from qlora_kit.weights.source import SafetensorsSource

    torch.set_num_threads(1)
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = make_tokenizer()
    with (
        tempfile.TemporaryDirectory(dir=checkpoint) as out,
        SafetensorsSource(checkpoint) as source,
    ):
        before = AnonymousPeak.read()
        with AnonymousPeak() as memory:
            started, cpu = time.perf_counter(), time.process_time()
            done = convert(
                source, config, tokenizer, Path(out), quantization=type_name, threads=threads
            )
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        size = done.files[type_name].stat().st_size
        numbers: dict[str, int] = {}
        for tensor in done.plan.tensors:
            stored = done.plan.types[type_name][tensor.name]
            numbers[stored] = numbers.get(stored, 0) + math.prod(tensor.shape)
    alone, alone_cpu = _time_ggml_alone(numbers, threads)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": memory.peak,
        "before": before,
        "input": sum(numbers.values()) * 4,
        "size": size,
        "alone_seconds": alone,
        "alone_cpu": alone_cpu,
    }


def _time_ggml_alone(numbers: dict[str, int], threads: int) -> tuple[float, float]:
    """Seconds ggml takes for so many numbers of each type, from a sample of random rows."""
    import numpy as np

    from qlora_kit.exporters.gguf.quantization.ggml import encode_rows

    generator = np.random.default_rng(0)
    total = total_cpu = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for type_name, count in numbers.items():
            if not type_name.startswith("Q"):
                continue
            amount = min(count, _SAMPLE) // _PIECE or 1
            pieces = [
                generator.standard_normal((_PIECE // _HIDDEN, _HIDDEN), dtype=np.float32) * 0.02
                for _ in range(amount)
            ]
            encode_rows(pieces[0], type_name)
            started, cpu = time.perf_counter(), time.process_time()
            for _ in pool.map(encode_rows, pieces, [type_name] * amount):
                pass
            scale = count / (amount * _PIECE)
            total += (time.perf_counter() - started) * scale
            total_cpu += (time.process_time() - cpu) * scale
    return total, total_cpu


def _in_fresh_process(*arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    # One thread for OpenMP: the workers are threads already.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure_once(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
