"""GGUF export, measured: speed and memory per type, and what each type costs in quality.

    python benchmarks/gguf.py speed --layers 22          # 1.1 billion random parameters
    python benchmarks/gguf.py quality path/to/checkpoint # needs xllamacpp

``speed`` writes a random Llama checkpoint of TinyLlama's shape in bfloat16, converts it to one
type at a time in a fresh process, and reports wall-clock seconds, the peak of anonymous memory
(the memory map of the checkpoint does not count: the system drops it at will), megabytes of
float32 input per second and core, and how that compares with ggml's quantizer alone on the same
matrices, by the clock and in processor seconds. ``quality`` converts a checkpoint to every type
and runs it in llama.cpp over a text: mean KL divergence from transformers in float32, agreement
of the most likely token, and perplexity. Results are printed as Markdown tables, beneath what
they were measured on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# This file would otherwise be imported in place of the gguf package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

TYPES = ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"]
TYPES += ["q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q5_1", "q5_0", "q4_1", "q4_0"]
_TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    today = time.strftime("%Y-%m-%d")
    return f"{model}, {count_cores()} cores, Python {platform.python_version()}, {today}"


# ---------------------------------------------------------------- speed


def make_checkpoint(folder: Path, layers: int) -> None:
    """A random Llama checkpoint, written tensor by tensor so that any size fits in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], **_TINYLLAMA)
    config.save_pretrained(folder)
    hidden, inner, vocab = 2048, 5632, 32000
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (256, hidden),
        "self_attn.v_proj": (256, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    weight_map, file = {}, ""
    for part in range(layers + 1):
        file = f"model-{part:05d}.safetensors"
        if part < layers:
            names = {f"model.layers.{part}.{name}.weight": shape for name, shape in shapes.items()}
        else:
            names = {
                "model.embed_tokens.weight": (vocab, hidden),
                "lm_head.weight": (vocab, hidden),
                "model.norm.weight": (hidden,),
            }
        save_file({name: random(shape) for name, shape in names.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
        return 0


def convert_once(checkpoint: Path, type_name: str, threads: int) -> dict[str, float]:
    """One conversion in this process: seconds, peak and baseline memory, size."""
    import torch

    from qlora_kit.exporters.gguf.convert import convert
    from qlora_kit.weights.source import SafetensorsSource

    torch.set_num_threads(1)
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory(dir=checkpoint) as out:
        before = AnonymousPeak.read()
        with AnonymousPeak() as memory, SafetensorsSource(checkpoint) as source:
            started, cpu = time.perf_counter(), time.process_time()
            done = convert(
                source, config, tokenizer, Path(out), quantization=type_name, threads=threads
            )
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        numbers = sum(math.prod(tensor.shape) for tensor in done.plan.tensors)
        size = done.files[type_name].stat().st_size
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": memory.peak,
        "before": before,
        "input": numbers * 4,
        "size": size,
    }


def quantize_bare(checkpoint: Path, type_name: str, threads: int) -> dict[str, float]:
    """Wall-clock and processor seconds of ggml alone, on the same matrices in float32."""
    import torch

    from qlora_kit.exporters.gguf.ggml import encode_rows
    from qlora_kit.exporters.gguf.planning import plan_conversion
    from qlora_kit.weights.source import SafetensorsSource

    torch.set_num_threads(1)
    config = json.loads((checkpoint / "config.json").read_text())
    total = cpu = 0.0
    with SafetensorsSource(checkpoint) as source, ThreadPoolExecutor(threads) as pool:
        plan = plan_conversion(source, config, quantization=type_name)
        types = plan.types[type_name]
        for tensor in plan.tensors:
            if not types[tensor.name].startswith("Q"):
                continue
            values = tensor.load(source).float().contiguous().numpy()
            step = max(1, (1 << 20) // values.shape[-1])
            pieces = [values[at : at + step] for at in range(0, len(values), step)]
            started, used = time.perf_counter(), time.process_time()
            for _ in pool.map(encode_rows, pieces, [types[tensor.name]] * len(pieces)):
                pass
            total += time.perf_counter() - started
            cpu += time.process_time() - used
    return {"seconds": total, "cpu": cpu}


def in_fresh_process(*arguments: str) -> Any:
    command = [sys.executable, __file__, "one", *arguments]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_speed(layers: int, threads: int, types: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="qlora_kit-bench-") as folder:
        make_checkpoint(Path(folder), layers)
        print(f"{describe_machine()}; {threads} threads, {layers} layers\n")
        print(
            "| type | size GB | seconds | MB/s per core | ggml alone s | share | of CPU | peak MB |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name in types:
            got = in_fresh_process("convert", folder, name, str(threads))
            bare = share = of_cpu = ""
            if name not in ("f32", "f16", "bf16"):
                alone = in_fresh_process("bare", folder, name, str(threads))
                bare, share = f"{alone['seconds']:.1f}", f"{alone['seconds'] / got['seconds']:.2f}"
                of_cpu = f"{alone['cpu'] / got['cpu']:.2f}"
            speed = got["input"] / got["seconds"] / threads / 1e6
            peak = (got["peak"] - got["before"]) / 1e6
            print(
                f"| {name} | {got['size'] / 1e9:.2f} | {got['seconds']:.1f} | {speed:.0f} | {bare} "
                f"| {share} | {of_cpu} | {peak:.0f} |",
                flush=True,
            )


# ---------------------------------------------------------------- quality


def run_quality(checkpoint: Path, types: list[str], text_file: Path | None, count: int) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exporters" / "gguf"))
    from gguf_llamacpp import Llama, kl_divergence
    from qlora_kit.exporters.gguf.convert import convert
    from qlora_kit.weights.source import SafetensorsSource

    text = text_file.read_text(encoding="utf-8") if text_file else Path(__file__).read_text()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text)["input_ids"][:count]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].numpy()
    del model

    def perplexity(logits: np.ndarray) -> float:
        rows = torch.log_softmax(torch.from_numpy(logits[:-1]).double(), -1)
        return float(torch.exp(-rows[range(len(ids) - 1), ids[1:]].mean()))

    print(f"{describe_machine()}; {checkpoint.name}, {len(ids)} tokens of {text_file or 'code'}\n")
    print("| type | MB | bits per weight | mean KL | top-1 | perplexity |")
    print("|---|---|---|---|---|---|")
    print(f"| transformers f32 | | | 0 | {len(ids)}/{len(ids)} | {perplexity(right):.3f} |")
    config = json.loads((checkpoint / "config.json").read_text())
    with tempfile.TemporaryDirectory(prefix="qlora_kit-bench-") as out:
        for name in types:
            with SafetensorsSource(checkpoint) as source:
                done = convert(source, config, tokenizer, Path(out), quantization=name)
            path = done.files[name]
            numbers = sum(math.prod(tensor.shape) for tensor in done.plan.tensors)
            with Llama(path, n_ctx=count + 8) as llama:
                logits = llama.logits(ids)
            kl = float(kl_divergence(right, logits).mean())
            agreed = int((logits.argmax(-1) == right.argmax(-1)).sum())
            size = path.stat().st_size
            print(
                f"| {name} | {size / 1e6:.0f} | {size * 8 / numbers:.2f} | {kl:.2e} "
                f"| {agreed}/{len(ids)} | {perplexity(logits):.3f} |",
                flush=True,
            )
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--layers", type=int, default=22)
    speed.add_argument("--threads", type=int, default=count_cores())
    speed.add_argument("--types", nargs="+", default=TYPES)
    quality = commands.add_parser("quality")
    quality.add_argument("checkpoint", type=Path)
    quality.add_argument("--types", nargs="+", default=TYPES)
    quality.add_argument("--text", type=Path)
    quality.add_argument("--tokens", type=int, default=500)
    one = commands.add_parser("one", help=argparse.SUPPRESS)
    one.add_argument("what", choices=["convert", "bare"])
    one.add_argument("folder", type=Path)
    one.add_argument("type")
    one.add_argument("threads", type=int)
    asked = parser.parse_args()
    if asked.command == "speed":
        run_speed(asked.layers, asked.threads, asked.types)
    elif asked.command == "quality":
        run_quality(asked.checkpoint, asked.types, asked.text, asked.tokens)
    else:
        measure = convert_once if asked.what == "convert" else quantize_bare
        print(json.dumps(measure(asked.folder, asked.type, asked.threads)))


if __name__ == "__main__":
    main()
