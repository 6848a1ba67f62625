"""From ``python script.py`` to the first finished step, by part, cold and warm.

    python benchmarks/start.py --model FOLDER_OR_GGUF --data rows.json --out results
    python benchmarks/start.py --model FOLDER --data rows.json --out results --engine native unsloth

Every line is a process of its own. Beside seconds stand those of the processor, all threads
together, which other work on the machine stretches less. Cold begins with empty caches of compiled
code and of dequantized files, warm is the same once more; the operating system's cache of files and
Python's of its own code are left as they are. Rows are Alpaca's. What a part is: see ``_PARTS``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_PARTS = {
    "imports": "the interpreter and the libraries",
    "dequantize": "a .gguf file into a cached checkpoint, or finding it there",
    "fingerprint": "reading all weights once, to know them again",
    "load": "the rest of loading: reading, quantizing, tokenizer",
    "attach": "the adapter",
    "rows": "reading the file",
    "prepare": "rows to tokens, the trainer, and what comes before the first step",
    "compile": "torch.compile within the first step, forward and backward",
    "first step": "the rest of it; the processor's seconds with compiling",
}
_WHOLE, _LATER = "to the first step's end", "a later step"
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "QLORA_KIT_CACHE")
_STEPS = 4


def main() -> None:
    """Run every line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--engine", nargs="*", default=["native"], choices=["native", "unsloth"])
    parser.add_argument("--plan", type=json.loads, help="for train_sft, as JSON")
    parser.add_argument("--max-steps", type=int, help="of the run that is begun", default=60)
    parser.add_argument("--limit", type=int, default=240, help="seconds for each line")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--worker")
    options = parser.parse_args()
    options.model, options.data = options.model.absolute(), options.data.absolute()
    if options.worker:
        _work(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, dict[str, Any]] = {}
    for engine in options.engine:
        with tempfile.TemporaryDirectory() as caches:
            for state in ("cold", "warm"):
                name = f"{engine}, {state}"
                lines[name] = _run(options, engine, Path(caches))
                print(name, json.dumps(lines[name]), flush=True)
    (options.out / "start.json").write_text(json.dumps(lines, indent=2))
    table = _describe(lines)
    (options.out / "start.md").write_text(table)
    print(table)


def _run(options: argparse.Namespace, engine: str, caches: Path) -> dict[str, Any]:
    command = [
        sys.executable, str(Path(__file__).absolute()), "--worker", engine,
        "--model", str(options.model), "--data", str(options.data),
        "--max-steps", str(options.max_steps), "--plan", json.dumps(options.plan),
    ]  # fmt: skip
    environment = os.environ | {name: str(caches / name.lower()) for name in _CACHES}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=options.limit,
                cwd=folder, env=environment | {"QLORA_KIT_BENCHMARK_STARTED": str(time.time())},
            )  # fmt: skip
        written, failure = done.stdout, "" if done.returncode == 0 else done.stderr[-1500:]
    except subprocess.TimeoutExpired as late:
        written, failure = (late.stdout or b"").decode(), f"took more than {options.limit} s"
    line: dict[str, Any] = {}
    for text in written.splitlines():
        if text.startswith("RESULT "):
            line |= json.loads(text[7:])
    if failure:
        print(failure, flush=True)
    return line


def _describe(lines: dict[str, dict[str, Any]]) -> str:
    rows = [["seconds (of the processor)", *lines], ["---"] * (len(lines) + 1)]
    for part in [*_PARTS, _WHOLE, _LATER]:
        found = [line.get(part) for line in lines.values()]
        rows.append(
            [part, *("" if one is None else f"{one[0]:.1f} ({one[1]:.1f})" for one in found)]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    meanings = "\n".join(f"- {part}: {meaning}" for part, meaning in _PARTS.items())
    return f"{table}\n\n{meanings}\n"


def _work(options: argparse.Namespace) -> None:
    clock = _Clock(float(os.environ["QLORA_KIT_BENCHMARK_STARTED"]))
    make = _make_unsloth if options.worker == "unsloth" else _make_ours
    train = make(options, clock)
    train(_make_callback(clock))


class _Clock:
    """Seconds of one part after the other, and the processor's."""

    def __init__(self, started: float) -> None:
        self._last = self._first = (started, 0.0)
        self._inside = [0.0, 0.0]

    def end(self, part: str) -> None:
        """A part has ended; what :meth:`timing` measured meanwhile is not of it."""
        now = _read_clocks()
        self.put(part, [b - a - c for a, b, c in zip(self._last, now, self._inside, strict=True)])
        self._last, self._inside = now, [0.0, 0.0]

    def end_all(self) -> None:
        """What was to be measured has ended."""
        self.put(_WHOLE, [b - a for a, b in zip(self._first, _read_clocks(), strict=True)])

    def put(self, part: str, taken: list[float]) -> None:
        """Write a part down; at once, for a line that does not get to its end."""
        print("RESULT " + json.dumps({part: taken}), flush=True)

    def move(self, part: str, taken: list[float]) -> None:
        """Write down what was measured within the part that is running."""
        self.put(part, taken)
        self._inside = [a + b for a, b in zip(self._inside, taken, strict=True)]

    def timing(self, module: Any, name: str, part: str) -> None:
        """Measure a function that a module calls."""
        inner = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = _read_clocks()
            try:
                return inner(*args, **kwargs)
            finally:
                now = _read_clocks()
                self.move(part, [b - a for a, b in zip(before, now, strict=True)])

        setattr(module, name, timed)


def _read_clocks() -> tuple[float, float]:
    return time.time(), sum(os.times()[:4])


def _make_ours(options: argparse.Namespace, clock: _Clock) -> Any:
    import bitsandbytes
    import peft
    import torch
    import transformers
    import trl

    from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft
    from qlora_kit.engines import base_model
    from qlora_kit.engines.gguf import cached_checkpoint

    # Their classes are what takes long; modules of such libraries load them when asked.
    _ = (peft.LoraConfig, transformers.Trainer, trl.SFTTrainer, torch.nn, bitsandbytes.nn)
    clock.end("imports")
    clock.timing(base_model, "fingerprint_weights", "fingerprint")
    clock.timing(cached_checkpoint, "dequantize_gguf", "dequantize")
    model = load_quantized(options.model, 2048, load_in_4bit=True, engine="native")
    clock.end("load")
    model = attach_lora(model, r=16, lora_alpha=16)
    clock.end("attach")
    rows = AlpacaFormatter(model.tokenizer).load(options.data)
    clock.end("rows")
    return lambda callback: train_sft(
        model, rows, max_steps=options.max_steps, plan=options.plan, callbacks=[callback],
        save_strategy="no",
    )  # fmt: skip


def _make_unsloth(options: argparse.Namespace, clock: _Clock) -> Any:
    from unsloth import FastLanguageModel  # isort: skip  # it must come before the others
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from train_worker import _PROMPT

    clock.end("imports")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.model), max_seq_length=2048, load_in_4bit=True, local_files_only=True
    )
    clock.end("load")
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    clock.end("attach")
    read = json.loads(options.data.read_text(encoding="utf-8"))
    texts = [_PROMPT.format_map({"input": "", **row}) + tokenizer.eos_token for row in read]
    clock.end("rows")
    on_gpu = torch.cuda.is_available()

    def train(callback: Any) -> None:
        args = SFTConfig(
            output_dir="outputs", per_device_train_batch_size=2, gradient_accumulation_steps=4,
            max_steps=options.max_steps, learning_rate=2e-4, warmup_steps=5, logging_steps=1,
            optim="adamw_8bit" if on_gpu else "adamw_torch", use_cpu=not on_gpu, bf16=True,
            report_to="none", save_strategy="no", dataset_text_field="text", max_length=2048,
            dataset_num_proc=1,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, processing_class=tokenizer, args=args, callbacks=[callback],
            train_dataset=Dataset.from_dict({"text": texts}),
        )  # fmt: skip
        trainer.train()

    return train


def _make_callback(clock: _Clock) -> Any:
    import torch
    from torch._dynamo.utils import calculate_time_spent
    from transformers import TrainerCallback

    class Moments(TrainerCallback):  # type: ignore[misc]
        """When steps begin and end; the run ends after a few."""

        steps = 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if self.steps == 0:
                clock.end("prepare")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.steps += 1
            if self.steps == 1:
                seconds = float(calculate_time_spent().get("total_wall_time", 0.0))
                clock.move("compile", [seconds, 0.0])
                clock.end("first step")
                clock.end_all()
            else:
                clock.end(_LATER)
            control.should_training_stop = self.steps == _STEPS

    return Moments()


if __name__ == "__main__":
    main()
