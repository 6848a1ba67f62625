"""How fast answers are written, beside transformers and Unsloth, or llama.cpp on a CPU.

    python benchmarks/generate.py --shape qwen3-4b --tokenizer FOLDER --out results
    python benchmarks/generate.py --model FOLDER_OR_GGUF --out results     # also on a CPU

Every line runs in a process of its own. Answers never end by themselves; prompts are random ids.
llama.cpp runs where ``xllamacpp`` is installed and ``--gguf`` names files.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NEVER = [10**6]


def main() -> None:
    """Run every line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--lines", nargs="*", default=["ours", "ours-batch", "transformers",
                                                       "unsloth"])  # fmt: skip
    parser.add_argument("--limit", type=int, default=240, help="seconds for each line")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        print("RESULT " + json.dumps(_work(options)), flush=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.shape:
        from train_worker import _make_model

        options.model = Path(tempfile.mkdtemp()) / options.shape
        subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; "
             "from train_worker import _make_model; "
             f"_make_model({options.shape!r}, Path({str(options.tokenizer)!r}), "
             f"Path({str(options.model)!r}))"],
            check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
        del _make_model
    results = {}
    for line in [*options.lines, *(f"llama.cpp {path}" for path in options.gguf)]:
        command = [sys.executable, __file__, "--worker", line, "--model", str(options.model),
                   "--tokens", str(options.tokens), "--at-once", str(options.at_once),
                   "--prompt-tokens", str(options.prompt_tokens)]  # fmt: skip
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=options.limit
            )
            found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
            results[line] = json.loads(found[-1][7:]) if found else {"error": done.stderr[-1500:]}
        except subprocess.TimeoutExpired:
            results[line] = {"error": f"took more than {options.limit} s"}
        print(line, json.dumps(results[line]), flush=True)
        (options.out / "generate.json").write_text(json.dumps(results, indent=2))


def _work(options: Any) -> dict[str, Any]:
    if options.worker.startswith("llama.cpp"):
        return _measure_llama_cpp(options)
    if options.worker == "unsloth":
        return _measure_generate(options, *_load_unsloth(options))
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from qlora_kit import attach_lora, load_quantized

    started = time.perf_counter()
    base = load_quantized(options.model, 4096, "bfloat16", load_in_4bit=True, engine="native")
    model = attach_lora(base, r=16)
    _randomize(model.model)
    loaded = time.perf_counter() - started
    if options.worker == "transformers":
        model.model.eval()
        return _measure_generate(options, model.model, loaded)
    if options.worker == "ours-batch":
        return _measure_batch(options, model)
    return {"load_seconds": loaded, **_measure_ours(options, model)}


def _measure_ours(options: Any, model: Any) -> dict[str, Any]:
    before = _allocated()
    first, _ = _time_answers(model, 1, 32, 1)
    _time_answers(model, 1, 32, 16)
    streams = [_time_answers(model, 1, 32, options.tokens)[1] for _ in range(3)]
    _time_answers(model, 1, options.prompt_tokens, 1)
    long = [_time_answers(model, 1, options.prompt_tokens, 1)[0] for _ in range(3)]
    return {
        "first_answer_seconds": first,
        "stream_tokens_per_second": streams,
        "long_first_token_seconds": long,
        "memory_gib": _allocated() - before,
    }


def _measure_batch(options: Any, model: Any) -> dict[str, Any]:
    before = _allocated()
    runs = [_time_answers(model, options.at_once, 32, options.tokens)[1] for _ in range(3)]
    return {"batch_tokens_per_second": runs, "memory_gib": _allocated() - before}


def _time_answers(model: Any, count: int, length: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second altogether.

    Tokens, not text: random ones are too few letters for a text to be put together from.
    """
    from qlora_kit.engines.contract import open_decoder, ready_to_generate
    from qlora_kit.generation.settings import make_config

    prompts = [_prompt(length) for _ in range(count)]
    config = make_config(model, {"max_new_tokens": tokens, "do_sample": False})
    config.eos_token_id = _NEVER
    started = time.perf_counter()
    with (
        ready_to_generate(model),
        open_decoder(
            model, config, seed=None, most_tokens=length + tokens, at_once=count
        ) as session,
    ):
        assert not isinstance(session, str), session
        answers = session.answer(iter(prompts))
        next(answers)
        first = time.perf_counter() - started
        for _ in answers:
            pass
    return first, count * tokens / (time.perf_counter() - started)


def _measure_generate(options: Any, model: Any, loaded: float) -> dict[str, Any]:
    import torch

    result: dict[str, Any] = {"load_seconds": loaded}
    device = model.get_input_embeddings().weight.device
    tokens = min(options.tokens, 128)

    def answer(prompts: list[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts, device=device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, use_cache=True,
            )  # fmt: skip
        return time.perf_counter() - started

    result["first_answer_seconds"] = answer([_prompt(32)], 1)
    answer([_prompt(32)], 8)
    for run in (1, 2):
        result[f"stream{run}_tokens_per_second"] = tokens / answer([_prompt(32)], tokens)
    answer([_prompt(options.prompt_tokens)], 1)
    result["long_first_token_seconds"] = answer([_prompt(options.prompt_tokens)], 1)
    many = [_prompt(32) for _ in range(options.at_once)]
    result["batch_tokens_per_second"] = options.at_once * tokens / answer(many, tokens)
    return result


def _load_unsloth(options: Any) -> tuple[Any, float]:
    from unsloth import FastLanguageModel

    started = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        str(options.model), max_seq_length=4096, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    _randomize(model)
    FastLanguageModel.for_inference(model)
    return model, time.perf_counter() - started


def _measure_llama_cpp(options: Any) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.worker.split(" ", 1)[1]
    params.n_ctx, params.cpuparams.n_threads = 1024, 2
    server = xllamacpp.Server(params)
    asked = {"prompt": "Tell me about the sea.", "n_predict": options.tokens,
             "temperature": 0, "ignore_eos": True}  # fmt: skip
    server.handle_completions({**asked, "n_predict": 8})
    started = time.perf_counter()
    server.handle_completions(asked)
    return {"stream_tokens_per_second": options.tokens / (time.perf_counter() - started)}


def _randomize(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)


def _prompt(length: int) -> list[int]:
    return list(_ids(length))


def _ids(length: int) -> Iterator[int]:
    for _ in range(length):
        yield random.randint(10, 250)


def _allocated() -> float:
    import torch

    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main()
