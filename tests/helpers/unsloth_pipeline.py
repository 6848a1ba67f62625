"""The pipeline on the unsloth engine, in a process of its own: unsloth patches libraries.

Run by test_unsloth.py as ``python unsloth_pipeline.py BASE FOLDER``; writes what it saw to
``FOLDER/seen.json``. What it prints on standard output is what a program would.
"""

import itertools
import json
import logging
import os
import random
import sys
import threading
import types
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

SAID_BY_CALLBACK = "a callback speaks"


class _Keep(logging.Handler):
    """Keeps every record."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


def main(base: Path, folder: Path) -> None:
    kept = _Keep()
    library = logging.getLogger("qlora_kit")
    library.setLevel(logging.INFO)
    library.addHandler(kept)
    os.chdir(folder)

    from qlora_kit import load_quantized
    from qlora_kit.engines.selection import resolve_engine

    seen: dict[str, object] = {"imported_early": "unsloth" in sys.modules}
    model = load_quantized(base, max_seq_length=128, dtype="float32", engine="unsloth")
    seen["engine"] = model.engine.name
    seen["quantization"] = model.base.quantization
    seen["stop_token_ids"] = list(model.base.stop_token_ids)
    seen["limits"] = [model.model.generation_config.max_length, model.tokenizer.model_max_length]
    seen["base_logits"] = read_logits(model, [5, 6, 7, 8, 9, 40, 41, 300])
    seen["refused"] = refuse_adapters(model)
    seen |= run_pipeline(model, folder)
    seen["checkpoints"] = load_others(folder / "others")
    seen["beyond"] = go_beyond_positions(base)
    seen["streams"] = watch_streams(base)
    seen["start"] = watch_start(base)

    seen["messages"] = [record.getMessage() for record in kept.records]
    kept.records.clear()
    seen["auto"] = resolve_engine("auto").name
    resolve_engine("native")
    seen["native_after"] = [(record.levelname, record.getMessage()) for record in kept.records]
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def read_logits(handle, ids):
    import torch

    with torch.no_grad(), handle.engine.inference(handle) as module:
        batch = torch.tensor([ids], device=module.device)
        return module(input_ids=batch).logits[0].float().tolist()


def say_refusal(action, *arguments, **options):
    """The class and words of the error of ours that an action raises, or None."""
    from qlora_kit.errors import QloraKitError

    try:
        action(*arguments, **options)
    except QloraKitError as error:
        return [type(error).__name__, str(error)]
    return None


def refuse_adapters(model):
    import torch

    from qlora_kit import attach_lora

    asked = {
        "loftq": {"loftq_config": {"loftq_bits": 4}},
        "use_dora": {"use_dora": True},
        "rank_pattern": {"rank_pattern": {"q_proj": 2}},
        "olora": {"init_lora_weights": "olora"},
    }
    refused = {
        name: say_refusal(attach_lora, model, r=4, **options) for name, options in asked.items()
    }
    # On a GPU unsloth imported it before, and would attach the adapter.
    if not torch.cuda.is_available():
        peft = sys.modules["peft"]
        sys.modules["peft"] = None
        try:
            refused["no peft"] = say_refusal(attach_lora, model, r=4)
        finally:
            sys.modules["peft"] = peft
    return refused


def run_pipeline(model, folder):
    """Train, generate, export and load again."""
    from qlora_kit import (
        AlpacaFormatter,
        attach_lora,
        export_model,
        generate_stream,
        load_quantized,
        train_sft,
    )

    seen = {}
    model = attach_lora(model, r=4)
    seen["trainable"] = model.trainable_parameters
    formatter = AlpacaFormatter(model.tokenizer)
    rows = [
        {"instruction": f"Say the number {n}.", "input": "", "output": f"The number is {n}."}
        for n in range(12)
    ]
    prompt = formatter.prompt("Say the number 3.")
    model.model.train()
    before = "".join(chunk.text for chunk in generate_stream(model, prompt, max_new_tokens=8))
    seen["still_training"] = model.model.training
    result = train_sft(
        model,
        formatter.load(rows),
        max_steps=6,
        output_dir=folder / "out",
        learning_rate=2e-2,
        warmup_steps=1,
        disable_tqdm=True,
        optim="adamw_torch",
        save_strategy="no",
        callbacks=[make_speaker()],
    )
    seen["losses"] = list(result.losses)
    seen["tokens"] = [result.tokens_seen, result.trained_tokens]
    chunks = list(generate_stream(model, prompt, max_new_tokens=8))
    seen["answers"] = [before, "".join(chunk.text for chunk in chunks)]
    seen["finish_reason"] = chunks[-1].finish_reason
    ids = [5, 6, 7, 8, 9, 40, 41, 300]
    seen["trained_logits"] = read_logits(model, ids)
    # unsloth speaks of an optimizer that its CPU backend replaces, before the plan is refused.
    options = {"output_dir": "x", "plan": {"enabled": True}, "optim": "lion_8bit"}
    seen["plan_refused"] = say_refusal(
        train_sft, model, formatter.load(rows), max_steps=1, **options
    )
    for name, options in {"lora": {}, "merged_16bit": {"base": "original"}}.items():
        artifact = export_model(model, name, folder / name, **options)
        seen[name] = [check.name for check in artifact.verification.checks if check.passed]
    again = load_quantized(folder / "lora", 128, "float32", engine="unsloth", is_trainable=False)
    seen["reloaded_logits"] = read_logits(again, ids)
    seen["reloaded_trainable"] = again.trainable_parameters
    return seen


def make_speaker():
    """A callback that prints, and on a CPU calls code of unsloth's that prints."""
    import torch
    from transformers import TrainerCallback

    class Speaker(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not torch.cuda.is_available():
                from unsloth_zoo.cpu.trainer import normalize_cpu_training_arguments

                normalize_cpu_training_arguments(types.SimpleNamespace(optim="adamw_8bit"))
            print(SAID_BY_CALLBACK)

    return Speaker()


def load_others(folder):
    """What loading each of a folder's checkpoints says."""
    from qlora_kit import load_quantized
    from qlora_kit.errors import EngineError

    said = {
        path.name: say_refusal(load_quantized, path, dtype="float32", engine="unsloth")
        for path in sorted(folder.iterdir())
    }
    whole = folder / "nf4"
    said["kept"] = load_quantized(whole, load_in_4bit=False, engine="unsloth").base.quantization
    half = load_quantized(folder / "plain", 64, "float16", engine="unsloth")
    said["half"] = [half.base.compute_dtype, str(half.model.dtype)]
    try:
        loaded = load_quantized(folder / "plain", load_in_8bit=True, engine="unsloth")
        said["int8"] = loaded.base.quantization
    except EngineError:
        said["int8"] = "refused"
    functional = sys.modules["bitsandbytes.functional"]
    sys.modules["bitsandbytes.functional"] = None
    try:
        said["no bitsandbytes"] = say_refusal(load_quantized, whole, engine="unsloth")
    finally:
        sys.modules["bitsandbytes.functional"] = functional
    return said


def go_beyond_positions(base):
    """A model of 512 positions, asked for more."""
    from qlora_kit import attach_lora, load_quantized

    model = load_quantized(base, 1024, "float32", load_in_4bit=False, engine="unsloth")
    model = attach_lora(model, r=4)
    return {
        "logits": read_logits(model, [5 + n % 300 for n in range(600)])[-1],
        "lengths": sorted(
            {
                vars(m)["max_seq_length"]
                for m in model.model.modules()
                if "max_seq_length" in vars(m)
            }
        ),
    }


def watch_streams(base):
    """How streams leave the model, and whether those that overlap are computed at once."""
    from qlora_kit import attach_lora, generate_stream, load_quantized

    model = attach_lora(
        load_quantized(base, 256, "float32", load_in_4bit=False, engine="unsloth"), r=4
    )
    module, prompt = model.model, "Below is an instruction that describes a task"
    transformers_log = _Keep()
    logging.getLogger("transformers").addHandler(transformers_log)
    module.generation_config.max_length = 512  # as unsloth sets it on a GPU
    module.config.use_cache = False
    module.gradient_checkpointing_enable()
    module.eval()
    adapters = [part for name, part in module.named_modules() if "lora_" in name]
    for part in adapters:
        part.train()

    def look():
        return [
            [part.training for part in module.modules()],
            [str(vars(part).get("gradient_checkpointing")) for part in module.modules()],
            module.config.use_cache,
            module.generation_config.max_length,
            model.tokenizer.padding_side,
        ]

    def read(stream):
        return "".join(chunk.text for chunk in stream)

    before = look()
    alone = [read(generate_stream(model, text, max_new_tokens=24)) for text in (prompt, "Rome is")]
    after_one = look()
    workers = []
    hook = module.get_input_embeddings().register_forward_hook(
        lambda *_: workers.append(threading.get_ident())
    )
    streams = [generate_stream(model, text, max_new_tokens=24) for text in (prompt, "Rome is")]
    started = [next(stream).text for stream in streams]
    during = [text + read(stream) for text, stream in zip(started, streams, strict=True)]
    hook.remove()
    streams = [generate_stream(model, prompt, max_new_tokens=24) for _ in range(2)]
    for stream in streams:
        next(stream)
    streams[0].close()
    under_the_other = [module.training, module.config.use_cache]
    streams[1].close()
    turns = sum(one != other for one, other in itertools.pairwise(workers))
    return {
        "before": before,
        "after": [after_one, look()],
        "under_the_other": under_the_other,
        "texts": [alone, during],
        "turns": turns,
        "warned": [
            record.getMessage()
            for record in transformers_log.records
            if "max_length" in record.getMessage()
        ],
    }


def watch_start(base):
    """The revision an adapter states, and what attaching one does to the global generators."""
    import numpy as np
    import torch

    from qlora_kit import attach_lora, load_quantized

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    def draw():
        return [random.random(), float(np.random.random()), float(torch.rand(1))]

    seed()
    model = attach_lora(
        load_quantized(base, 128, "float32", engine="unsloth", revision="v2"), r=4, random_state=5
    )
    drawn = draw()
    seed()
    return {
        "revision": model.model.peft_config["default"].revision,
        "drawn": [drawn, draw()],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
