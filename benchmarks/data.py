"""Rows per second from text to packed token ids, here and in TRL, in one run.

    python benchmarks/data.py --data alpaca_en_demo.json --tokenizer FOLDER --output data.json

Both sides start from the same 50,000 rows in memory and end with packed rows of token ids and
completion-only labels, and nothing is in a cache when they start. TRL is given its prompts
rendered, and runs once with one process and once with all cores; the better of the two is
compared. Reported too: how full packed rows of the original data are, and what plain padding
wastes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure, print a table, and write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, nargs="+", help="Alpaca rows, any file type"
    )
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=50_000, help="rows to make from the first file")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    cache = tempfile.TemporaryDirectory()
    os.environ["QLORA_KIT_CACHE"] = cache.name
    # TRL warns that packing needs FlashAttention; nothing is trained here.
    logging.getLogger("trl").setLevel(logging.ERROR)

    from transformers import AutoTokenizer

    from qlora_kit.data import AlpacaFormatter

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    formatter = AlpacaFormatter(tokenizer, response_only=True)
    own = formatter.load(arguments.data[0])
    # Numbered, so that no two rows are the same and nothing can be looked up.
    rows = [
        {**own[i % len(own)], "instruction": f"{own[i % len(own)]['instruction']} ({i})"}
        for i in range(arguments.rows)
    ]
    figures: dict[str, Any] = {"rows": len(rows)}
    figures |= measure_own(formatter, rows, arguments.max_length)
    for processes in sorted({1, os.cpu_count() or 1}):
        figures |= measure_trl(formatter, rows, arguments.max_length, processes)
    best = max(value for name, value in figures.items() if "TRL" in name and "rows/s" in name)
    figures["qlora_kit / TRL at its best, rows/s"] = figures["qlora_kit: all of it, rows/s"] / best
    for path in arguments.data:
        encoded = formatter.encode(path, max_length=arguments.max_length, cache=False)
        for name, value in measure_waste(encoded.dataset, arguments.max_length).items():
            figures[f"{path.name}: {name}"] = value
    for name, value in figures.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:<62}{shown:>14}")
    conditions = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "tokenizer": type(tokenizer).__name__ + f" of {len(tokenizer):,} tokens",
        "versions": {
            name: version(name)
            for name in ("qlora-kit", "trl", "transformers", "tokenizers", "datasets", "torch")
        },
    }
    print(json.dumps(conditions))
    if arguments.output:
        text = json.dumps({**conditions, "figures": figures}, indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")


def measure_own(formatter: Any, rows: list[dict[str, str]], max_length: int) -> dict[str, Any]:
    """Checked rows to packed rows, the cache filled on the way; and once more out of it."""
    from qlora_kit.data import pack_examples

    start = time.perf_counter()
    loaded = formatter.load(rows)
    checked = time.perf_counter()
    encoded = formatter.encode(loaded, max_length=max_length, cache=True)
    tokenized = time.perf_counter()
    packed = pack_examples(encoded.dataset, max_length)
    done = time.perf_counter()
    again = formatter.encode(formatter.load(rows), max_length=max_length, cache=True)
    found = time.perf_counter()
    assert again.report.is_cached
    return {
        "qlora_kit: check, rows/s": len(rows) / (checked - start),
        "qlora_kit: tokenize and label, rows/s": len(rows) / (tokenized - checked),
        "qlora_kit: pack, rows/s": len(rows) / (done - tokenized),
        "qlora_kit: all of it, rows/s": len(rows) / (done - start),
        "qlora_kit: all of it again, from the cache, rows/s": len(rows) / (found - done),
        "qlora_kit: tokens": encoded.report.tokens,
        "qlora_kit: packed rows": len(packed),
    }


def measure_trl(
    formatter: Any, rows: list[dict[str, str]], max_length: int, processes: int
) -> dict[str, Any]:
    """What ``SFTTrainer`` does with a prompt/completion dataset before it trains."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    disable_progress_bars()
    tokenizer = formatter.tokenizer
    figures: dict[str, Any] = {}
    name = f"TRL, {processes} process{'es' if processes > 1 else ''}"

    class TimedTrainer(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            dataset = super()._prepare_dataset(*args, **kwargs)
            figures[f"{name}: all of it, rows/s"] = len(rows) / (time.perf_counter() - start)
            figures[f"{name}: packed rows"] = len(dataset)
            figures[f"{name}: tokens"] = sum(map(sum, dataset["seq_lengths"]))
            return dataset

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    dataset = Dataset.from_list(
        [
            {
                "prompt": str(formatter.prompt(row["instruction"], row["input"])),
                "completion": row["output"],
            }
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        TimedTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder, max_length=max_length, packing=True, use_cpu=True, bf16=False,
                dataset_num_proc=processes, report_to="none", disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
        )  # fmt: skip
    return figures


def measure_waste(dataset: Any, max_length: int) -> dict[str, Any]:
    """Real tokens per slot of a batch: packed, and padded to the longest of random batches."""
    from qlora_kit.data import pack_examples

    lengths = [len(ids) for ids in dataset["input_ids"]]
    packed = pack_examples(dataset, max_length)
    figures: dict[str, Any] = {
        f"packed to {max_length}, real tokens / slots": sum(lengths) / (len(packed) * max_length)
    }
    random.Random(0).shuffle(lengths)
    for batch in (2, 8, 32):
        groups = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
        slots = sum(len(group) * max(group) for group in groups)
        figures[f"padded, batches of {batch}, wasted share"] = 1 - sum(lengths) / slots
    return figures


if __name__ == "__main__":
    main()
