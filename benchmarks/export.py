"""Merged 16-bit export, measured beside its peers: seconds, memory and bytes written.

    python benchmarks/export.py                          # 0.5 billion parameters
    python benchmarks/export.py --size 4b                # on a GPU
    python benchmarks/export.py --only ours peft --json results.json

A random checkpoint of the chosen size is written once. Each way of exporting then runs in a
process of its own: it loads the checkpoint, attaches a LoRA of rank 16 to the seven projections
with random values, and writes the merged model in bfloat16.

- ``ours``: ``export_model(model, "merged_16bit", verify=False)`` on the unquantized base, as peft.
- ``ours-4bit``: the same on an NF4 base, merging into the original weights, as Unsloth.
- ``ours-verified``: ``ours`` with ``verify=True``.
- ``peft``: ``merge_and_unload().save_pretrained()`` on the unquantized base.
- ``unsloth``: ``save_pretrained_merged(save_method="merged_16bit")`` on an NF4 base; without a
  GPU on an unquantized one, because it refuses the other there.

Memory is the peak of the resident set above what the process held before the export; pages of
memory-mapped files, which the system drops at will, are counted apart. Ours is on the disk when
the call returns; the peers' files may still be in the page cache, so the seconds it takes to
bring them to the disk are given as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

WAYS = ("ours", "ours-4bit", "ours-verified", "peft", "unsloth")
LABELS = {
    "ours": "qlora_kit merged_16bit, 16-bit base",
    "ours-4bit": "qlora_kit merged_16bit, NF4 base",
    "ours-verified": "the first, with verify=True",
    "peft": "peft merge_and_unload, 16-bit base",
    "unsloth": "Unsloth save_pretrained_merged, NF4 base (16-bit without a GPU)",
}
#: hidden, intermediate, layers, heads, key/value heads, head dimension, vocabulary, tied head
SIZES = {
    "tiny": (512, 1536, 8, 8, 4, 64, 4096, True),
    "0.5b": (1024, 3072, 24, 16, 8, 128, 65536, True),
    "1.1b": (2048, 5632, 22, 32, 4, 64, 32000, False),
    "4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 1024**3


# ---------------------------------------------------------------- the checkpoint


def make_checkpoint(folder: Path, size: str) -> int:
    """A random Qwen3 checkpoint, written layer by layer; returns its parameter count."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, tied = SIZES[size]
    Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
        dtype="bfloat16", architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    make_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    def layer(prefix: str) -> dict[str, torch.Tensor]:
        queries, keys = heads * head_dim, kv_heads * head_dim
        matrices = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden,
                 "self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}  # fmt: skip
        return {
            **{f"{prefix}{name}.weight": random(*shape) for name, shape in matrices.items()},
            **{f"{prefix}{name}.weight": 1 + random(width) for name, width in norms.items()},
        }

    weight_map, count = {}, 0
    for part in range(layers + 1):
        file = f"model-{part:05d}.safetensors"
        if part < layers:
            tensors = layer(f"model.layers.{part}.")
        else:
            tensors = {"model.embed_tokens.weight": random(vocabulary, hidden)}
            tensors["model.norm.weight"] = 1 + random(hidden)
            if not tied:
                tensors["lm_head.weight"] = random(vocabulary, hidden)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", *letters]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


# ---------------------------------------------------------------- one export, in its own process


class PeakMemory:
    """Samples this process's resident set, whole and without pages of mapped files."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self.idle = self.read()
        self.peak = self.idle
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def read(self) -> tuple[int, int]:
        memory = self._process.memory_info()
        # "shared" holds the pages of mapped files where the system tells (Linux).
        return memory.rss, memory.rss - getattr(memory, "shared", 0)

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            now = self.read()
            self.peak = (max(self.peak[0], now[0]), max(self.peak[1], now[1]))


def randomize(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)


def prepare_ours(base: Path, *, load_in_4bit: bool, verify: bool) -> Any:
    import qlora_kit

    model = qlora_kit.load_quantized(base, 512, "bfloat16", load_in_4bit, engine="native")
    model = qlora_kit.attach_lora(model, r=16)
    randomize(model.model)
    # As Unsloth does; the default merges into the 4-bit weights that were trained on.
    return lambda out: qlora_kit.export_model(
        model, "merged_16bit", out, base="original", verify=verify
    )


def prepare_peft(base: Path) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, device_map={"": device}
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS))
    randomize(model)

    def export(out: Path) -> None:
        model.merge_and_unload().save_pretrained(out)
        tokenizer.save_pretrained(out)

    return export


def prepare_unsloth(base: Path) -> Any:
    # First, because it patches the others.
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    # On a CPU it refuses to merge into a 4-bit base (2026.10.9).
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=512,
        load_in_4bit=torch.cuda.is_available(),
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, target_modules=PROJECTIONS)
    randomize(model)
    return lambda out: model.save_pretrained_merged(str(out), tokenizer, save_method="merged_16bit")


def run_one(way: str, base: Path, out: Path) -> dict[str, Any]:
    if way == "peft":
        export = prepare_peft(base)
    elif way == "unsloth":
        export = prepare_unsloth(base)
    else:
        export = prepare_ours(base, load_in_4bit=way == "ours-4bit", verify=way == "ours-verified")
    gc.collect()
    processor = time.process_time()
    started = time.perf_counter()
    with PeakMemory() as memory:
        export(out)
        seconds = time.perf_counter() - started
    for file in out.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    return {
        "seconds": seconds,
        "seconds_until_on_disk": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "idle_gib": memory.idle[0] / GIB,
        "peak_above_idle_gib": (memory.peak[0] - memory.idle[0]) / GIB,
        "unmapped_above_idle_gib": (memory.peak[1] - memory.idle[1]) / GIB,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }


# ---------------------------------------------------------------- the table


def describe_machine() -> dict[str, Any]:
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"python": platform.python_version()}
    for package in ("qlora-kit", "torch", "transformers", "peft", "bitsandbytes", "unsloth",
                    "safetensors"):  # fmt: skip
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU",
        "processor": name,
        "cores": cores,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def format_table(results: dict[str, dict[str, Any]], reference: str) -> str:
    lines = [
        "| export | seconds | until on disk | times the first | peak RSS above idle, GiB "
        "| of it not mapped files | GiB written |",
        "|---|---|---|---|---|---|---|",
    ]
    first = results.get(reference, {}).get("seconds_until_on_disk")
    for way, result in results.items():
        if "error" in result:
            lines.append(f"| {LABELS[way]} | failed: {result['error']} | | | | | |")
            continue
        durable = result["seconds_until_on_disk"]
        ratio = f"{durable / first:.2f}" if first else ""
        lines.append(
            f"| {LABELS[way]} | {result['seconds']:.1f} | {durable:.1f} | {ratio} "
            f"| {result['peak_above_idle_gib']:.2f} | {result['unmapped_above_idle_gib']:.2f} "
            f"| {result['bytes'] / GIB:.2f} |"
        )
    return "\n".join(lines)


def spawn(way: str, base: Path, work: Path, *, timeout: int) -> dict[str, Any]:
    out, report = work / f"out-{way}", work / f"{way}.json"
    command = [sys.executable, __file__, "--one", way, str(base), str(out), str(report)]
    try:
        done = subprocess.run(
            command,
            capture_output=True, text=True, check=False, timeout=timeout,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {timeout} s"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0 or not report.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:200].replace("|", "/")}
    return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of these is reported")
    parser.add_argument("--folder", type=Path, help="where to write (a fast disk), else TMPDIR")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds per export")
    parser.add_argument("--json", type=Path, help="also write everything measured there")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, base, out, report = options.one
        result = run_one(way, Path(base), Path(out))
        Path(report).write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        base = work / "base"
        base.mkdir()
        parameters = make_checkpoint(base, options.size)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options.only}
        # In turn, so that a machine that changes speed does so for everyone.
        for _ in range(options.repeats):
            for way in options.only:
                runs[way].append(spawn(way, base, work, timeout=options.timeout))
    results = {
        way: min(done, key=lambda run: run.get("seconds_until_on_disk", float("inf")))
        for way, done in runs.items()
    }
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{parameters / 1e9:.2f} billion parameters, bfloat16; {machine['device']}, "
          f"{machine['processor']}, {machine['cores']} cores; {machine['date']}")  # fmt: skip
    print(f"{versions}; best of {options.repeats}\n")
    print(format_table(results, options.only[0]))
    if options.json:
        options.json.write_text(
            json.dumps(
                {"machine": machine, "size": options.size, "parameters": parameters, "runs": runs},
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
