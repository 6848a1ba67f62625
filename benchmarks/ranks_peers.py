"""TRL with DDP or FSDP2, and Unsloth, on the rows of ``ranks.py``: one line of JSON.

torchrun --standalone --nproc-per-node 2 benchmarks/ranks_peers.py FOLDER --engine trl-ddp
accelerate launch --multi_gpu --num_processes 2 benchmarks/ranks_peers.py FOLDER --engine unsloth
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", choices=("trl-ddp", "trl-fsdp2", "unsloth"), required=True)
    parser.add_argument("--rows", type=int, default=8, help="rows per card and step")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--length", type=int, default=0, help="tokens of every row; 0: as drawn")
    parser.add_argument("--output", default="ranks_peers_output")
    options = parser.parse_args()
    model, tokenizer = (_load_unsloth if options.engine == "unsloth" else _load_plain)(options)
    _train(options, model, tokenizer)


def _load_unsloth(options: argparse.Namespace) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.model), max_seq_length=2048, load_in_4bit=True, local_files_only=True,
        device_map={"": int(os.environ.get("LOCAL_RANK", "0"))},
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=_MODULES,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    return model, tokenizer


def _load_plain(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    card = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(card)
    is_sharded = options.engine == "trl-fsdp2"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # As bytes, FSDP would leave them whole on every card.
        **({"bnb_4bit_quant_storage": torch.bfloat16} if is_sharded else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        str(options.model), dtype=torch.bfloat16, quantization_config=quantization,
        device_map={"": card}, local_files_only=True,
    )  # fmt: skip
    adapter = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.0, target_modules=_MODULES, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapter)
    if is_sharded:
        # One dtype for all that FSDP lays together.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(str(options.model), local_files_only=True)


def _train(options: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ranks import draw_rows

    rows = draw_rows(4_000)
    if options.length:
        rows = [{name: (ids * 100)[: options.length] for name, ids in row.items()} for row in rows]
    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    sharding: dict[str, Any] = {}
    if options.engine == "trl-fsdp2":
        name = type(model.get_base_model().model.layers[0]).__name__
        sharding = {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2, "transformer_layer_cls_to_wrap": [name],
                "reshard_after_forward": True, "use_orig_params": True,
            },
        }  # fmt: skip
    args = SFTConfig(
        output_dir=options.output, per_device_train_batch_size=options.rows,
        max_steps=options.steps,
        gradient_accumulation_steps=1, gradient_checkpointing=True, bf16=True, logging_steps=1,
        gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=2e-4,
        optim="adamw_torch" if sharding else "adamw_8bit", report_to="none", save_strategy="no",
        disable_tqdm=True, max_length=None, ddp_find_unused_parameters=False, **sharding,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, args=args, train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )  # fmt: skip
    take = trainer.get_batch_samples

    def count(*arguments: Any, **keywords: Any) -> Any:
        taken = take(*arguments, **keywords)
        tokens.append(sum(int((one["labels"] != -100).numel()) if "attention_mask" not in one
                          else int(one["attention_mask"].sum()) for one in taken[0]))  # fmt: skip
        return taken

    trainer.get_batch_samples = count
    started = time.perf_counter()
    trainer.train()
    if os.environ.get("RANK", "0") != "0":
        return
    warm = max(len(ends) // 3, 1)
    seconds = sorted(b - a for a, b in zip(ends[warm:], ends[warm + 1 :], strict=False))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # Of this rank's tokens, which are as many as any other's on average.
    own = sum(tokens[warm + 1 : len(ends)])
    found = {
        "engine": options.engine, "world": world, "rows": options.rows, "steps": len(ends),
        "median_ms": round(1000 * seconds[len(seconds) // 2], 1),
        "tokens_per_second": round(world * own / sum(seconds)),
        "first_step_s": round(ends[0] - started, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "losses": [round(e["loss"], 4) for e in trainer.state.log_history if "loss" in e][-2:],
    }  # fmt: skip
    print("RANKS " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
