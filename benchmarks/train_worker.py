"""One process of the training benchmark: preparing the model, or training one line."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_shapes import SHAPES
from train_rows import ROWS, Row

#: Trains, watched, with further callbacks.
Run = Callable[[Any, list[Any]], None]

_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


def work(job: dict[str, Any]) -> None:
    """Do what a job file says."""
    result = _prepare(job) if job["kind"] == "prepare" else _train(job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def _prepare(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from qlora_kit.device import get_device, get_device_name, get_versions

    device = get_device()
    folder = Path(job["model"] or Path(job["work"]) / job["shape"])
    if job["shape"] and not (folder / "config.json").is_file():
        _make_model(job["shape"], Path(job["tokenizer"]), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = json.loads(Path(job["data"]).read_text(encoding="utf-8"))
    texts = [_PROMPT.format_map(row) + tokenizer.eos_token for row in rows]
    ids = [tokenizer(text)["input_ids"][: job["max_length"]] for text in texts]
    data = Path(job["work"]) / "rows.json"
    data.write_text(json.dumps({"texts": texts, "ids": ids}), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    versions = get_versions()
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")
    return {
        "model": str(folder),
        "model_name": job["shape"] or folder.name,
        "parameters": _count_parameters(config),
        "data": str(data),
        "max_length": job["max_length"],
        "device": get_device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{name} {versions[name]}" for name in names if name in versions),
        "tokens_in_data": sum(map(len, ids)),
    }


def _make_model(shape: str, tokenizer: Path, folder: Path) -> None:
    """Random weights of a known shape, quantized to NF4 and saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_kit import load_quantized
    from qlora_kit.device import get_device

    # Experts stay in 16 bits: nothing is gained by saving the rest in 4.
    has_experts = "num_experts" in SHAPES[shape]
    raw = folder if has_experts else folder.with_name(folder.name + "-16bit")
    torch.manual_seed(0)
    rows = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    values = {"model_type": "qwen3", "eos_token_id": rows.eos_token_id, **SHAPES[shape]}
    values["vocab_size"] = max(values["vocab_size"], len(rows))
    config = AutoConfig.for_model(**values)
    with torch.device(get_device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(raw)
    rows.save_pretrained(raw)
    del model
    if has_experts:
        return
    loaded = load_quantized(raw, dtype="bfloat16")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    for file in raw.iterdir():
        file.unlink()
    raw.rmdir()


def _choose_targets(model: Any) -> Any:
    """The classic script's seven projections; around experts, those that modules hold."""
    from qlora_kit.config import DEFAULT_TARGET_MODULES

    return "attention" if hasattr(model.config, "num_experts") else DEFAULT_TARGET_MODULES


def _count_parameters(config: dict[str, Any]) -> int:
    """Weights that take part in a token's matrix products, the head included once."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    inner, experts = config["intermediate_size"], config.get("num_experts", 0)
    if experts:
        inner = config["num_experts_per_tok"] * config["moe_intermediate_size"]
    layer = hidden * (2 * q + 2 * kv + experts) + 3 * hidden * inner
    return int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def _train(job: dict[str, Any]) -> dict[str, Any]:
    row = next(row for row in ROWS if row.name == job["row"])
    job["facts"]["dtype"] = row.dtype or job["facts"]["dtype"]
    started = time.perf_counter()
    maker = {"ours": _make_ours, "trl": _make_trl, "unsloth": _make_unsloth}[row.engine]
    run = maker(row, job)
    ready = time.perf_counter()
    import torch

    from train_watch import Watch, profile_steps

    watch = Watch(torch)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    table = profile_steps(run, watch, job) if row.profile else None
    if table is None:
        run(watch, [])
    first = min(job["warmup"], len(watch.steps) // 2)
    kept = watch.steps[first:]
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "tokens_per_second": sum(t for _, t in kept) / sum(s for s, _ in kept),
        "median_tokens_per_second": statistics.median(t / s for s, t in kept),
        "step_seconds": statistics.median(s for s, _ in kept),
        "processor_seconds": statistics.median(watch.processor_seconds[first:]),
        "tokens_per_step": statistics.mean(t for _, t in kept),
        "first_step_seconds": watch.steps[0][0],
        "all_steps": watch.steps,
        "load_seconds": ready - started,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resident,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else resident,
        "losses": watch.losses,
        "plan": watch.plan,
        "kernels": table,
    }


def _arguments(row: Row, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(Path(job["work"]) / f"run-{row.name}"),
        "per_device_train_batch_size": row.batch,
        "gradient_accumulation_steps": row.accumulation,
        "max_steps": job["steps"],
        "warmup_steps": 5,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "report_to": "none",
        "optim": "adamw_8bit" if on_gpu else "adamw_torch",
        "bf16": job["facts"]["dtype"] == "bfloat16",
        "fp16": job["facts"]["dtype"] == "float16",
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }


def _fill(parts: list[Any], lengths: list[int], filled: int) -> list[Any]:
    """Texts or token ids, joined to examples of at least ``filled`` tokens each."""
    joined, rest = [], 0
    for part, length in zip(parts * (8 * filled // sum(lengths) + 1), itertools.cycle(lengths)):
        if rest <= 0:
            joined.append(part[:0])
            rest = filled
        joined[-1] += part
        rest -= length
    return joined


def _tokenized(row: Row, job: dict[str, Any]) -> Any:
    from datasets import Dataset

    ids = json.loads(Path(job["facts"]["data"]).read_text(encoding="utf-8"))["ids"]
    if row.filled:
        ids = [one[: row.filled] for one in _fill(ids, [len(one) for one in ids], row.filled)]
    return Dataset.from_list([{"input_ids": part, "labels": part} for part in ids])


def _make_ours(row: Row, job: dict[str, Any]) -> Run:
    """The public way: load, attach, train; packing included."""
    import logging

    logging.basicConfig(level=logging.INFO)
    from qlora_kit import attach_lora, load_quantized, train_sft

    facts = job["facts"]
    length = row.filled or row.packed or facts["max_length"]
    loaded = load_quantized(facts["model"], length, facts["dtype"], engine="native")
    model = attach_lora(loaded, target_modules=_choose_targets(loaded.model))
    plan = dict(row.plan)
    if row.checkpointing is not None:
        plan["checkpointing"] = row.checkpointing
    dataset = _tokenized(row, job)
    settings = _arguments(row, job)
    settings.pop("use_cpu")

    def run(watch: Any, callbacks: list[Any]) -> None:
        watch.start()
        result = train_sft(
            model, dataset, plan=plan, packing=bool(row.packed),
            max_length=length, callbacks=[watch.callback, *callbacks], **settings,
        )  # fmt: skip
        watch.plan = result.plan

    return run


def _run_trainer(trainer: Any) -> Run:
    from train_watch import count_tokens

    def run(watch: Any, callbacks: list[Any]) -> None:
        for callback in (watch.callback, *callbacks):
            trainer.add_callback(callback)
        count_tokens(trainer, watch)
        watch.start()
        trainer.train()

    return run


def _make_trl(row: Row, job: dict[str, Any]) -> Run:
    from trl import SFTConfig, SFTTrainer

    from qlora_kit import attach_lora, load_quantized
    from qlora_kit.engines.native.trainer import NativeTrainer

    facts = job["facts"]
    loaded = load_quantized(facts["model"], dtype=facts["dtype"], engine="native")
    model = attach_lora(loaded, target_modules=_choose_targets(loaded.model))
    packing = {"packing": True, "max_length": row.packed} if row.packed else {"max_length": None}
    args = SFTConfig(
        **_arguments(row, job), gradient_checkpointing=bool(row.checkpointing), **packing
    )
    settings: dict[str, Any] = {"model": model.model, "args": args}
    settings |= {"train_dataset": _tokenized(row, job), "processing_class": model.tokenizer}
    if args.use_cpu:
        # TRL 1.15's own loss is a triton kernel; this adds the model's own and nothing else.
        return _run_trainer(NativeTrainer(**settings, plan=False))
    return _run_trainer(SFTTrainer(**settings))


def _make_unsloth(row: Row, job: dict[str, Any]) -> Run:
    from unsloth import FastLanguageModel  # isort: skip  # it must come before the others
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    length = row.filled or row.packed or job["facts"]["max_length"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["facts"]["model"], max_seq_length=length, load_in_4bit=True,
        dtype=getattr(torch, job["facts"]["dtype"]), local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                        "down_proj"],
        use_gradient_checkpointing=row.checkpointing, max_seq_length=length,
    )  # fmt: skip
    data = json.loads(Path(job["facts"]["data"]).read_text(encoding="utf-8"))
    texts = data["texts"]
    if row.filled:
        texts = _fill(texts, [len(one) for one in data["ids"]], row.filled)
    args = SFTConfig(
        **_arguments(row, job), dataset_text_field="text", max_length=length,
        packing=bool(row.packed), dataset_num_proc=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
    )  # fmt: skip
    return _run_trainer(trainer)
