"""Small quantized models with adapters that already say something."""

import random

import pytest
import torch

from qlora_kit.engines.base import TrainJob


@pytest.fixture
def make_adapted(tiny_llama, tiny_qwen3):
    """Load a tiny model and attach an adapter whose B matrices are not zero."""

    def make(kind="llama", *, dtype="float32", load_in_4bit=True, load_in_8bit=False, **adapter):
        from qlora_kit import attach_lora, load_quantized

        folder = tiny_llama if kind == "llama" else tiny_qwen3
        loaded = load_quantized(folder, 256, dtype, load_in_4bit, load_in_8bit, engine="native")
        settings = {"r": 4, "lora_alpha": 6, "use_gradient_checkpointing": False, **adapter}
        adapted = attach_lora(loaded, **settings)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.data.copy_(values)
        return adapted

    return make


@pytest.fixture(scope="session")
def token_rows():
    """Rows of 4 to 40 random tokens, the first three of each without loss."""
    source = random.Random(0)
    rows = []
    for _ in range(48):
        ids = [source.randint(5, 300) for _ in range(source.randint(4, 40))]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


def _collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name, value):
        return torch.tensor([r[name] + [value] * (longest - len(r[name])) for r in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


@pytest.fixture
def make_trainer(token_rows, tmp_path):
    """A trainer over the token rows; ``plan=False`` is plain TRL and peft."""

    def make(adapted, plan, *, rows=None, with_eval=False, chooses=False, **fields):
        from datasets import Dataset
        from trl import SFTConfig

        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4, "max_steps": 8, "logging_steps": 1,
            "learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.01,
            "optim": "adamw_torch", "bf16": False, "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "seed": 1, "remove_unused_columns": False, "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True}, "disable_tqdm": True,
            "gradient_checkpointing": False, "save_strategy": "no",
            "dataloader_pin_memory": False, **fields,
        }  # fmt: skip
        job = TrainJob(
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list(rows or token_rows),
            eval_dataset=Dataset.from_list(token_rows[:7]) if with_eval else None,
            collator=_collate,
            is_packed=False,
            plan=plan,
            chooses_checkpointing=chooses,
        )
        return adapted.engine.make_trainer(adapted, job)

    return make
