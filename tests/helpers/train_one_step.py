"""One optimizer step through ``train_sft``, in as many processes as torchrun starts.

    python train_one_step.py BASE FOLDER '{"name": {"per_device_train_batch_size": 2}}'

Each rank writes ``FOLDER/NAME-RANK.pt``: losses, token counts and the adapter's weights.
"""

import json
import os
import sys
from pathlib import Path

import torch

from checkpoints import randomize
from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft

ROWS = [
    {"instruction": "Say " * (1 + n % 3), "input": "", "output": "hello world " * (1 + n * 5 % 7)}
    for n in range(8)
]


def main(base: str, folder: str, layouts: dict[str, dict[str, object]]) -> None:
    rank = os.environ.get("RANK", "0")
    for name, layout in layouts.items():
        model = randomize(attach_lora(load_quantized(base, 128, "float32", False), r=4))
        formatter = AlpacaFormatter(
            model.tokenizer, "{instruction}{input}|{output}", response_only=True
        )
        result = train_sft(
            model, formatter.load(ROWS), output_dir=Path(folder) / f"run-{rank}", plan=False,
            max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
            warmup_steps=0, max_grad_norm=0.0, weight_decay=0.0, save_strategy="no",
            disable_tqdm=True, **layout,
        )  # fmt: skip
        weights = {n: p.detach().cpu() for n, p in model.model.named_parameters()
                   if p.requires_grad}  # fmt: skip
        found = {
            "losses": result.losses, "tokens": (result.tokens_seen, result.trained_tokens),
            "weights": weights,
        }  # fmt: skip
        torch.save(found, Path(folder) / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
