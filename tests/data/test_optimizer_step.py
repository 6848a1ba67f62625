"""One optimizer step is the same however its examples are split into micro-batches or laid out.

Through TRL's own trainer, the way ``train_sft`` uses it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data import AlpacaFormatter, PackedCollator, PaddedCollator, pack_examples

from .conftest import make_model


def _dataset(tokenizer: Any) -> Any:
    rng = random.Random(0)
    rows = [
        {"instruction": "Say " * rng.randint(1, 9), "output": "hello world " * rng.randint(1, 25)}
        for _ in range(8)
    ]
    return AlpacaFormatter(tokenizer, response_only=True).encode(rows, max_length=256).dataset


def _step(
    tokenizer: Any, folder: Path, dataset: Any, collator: Any, batch: int, accumulate: int,
    *, checkpointing: bool = False,
) -> tuple[dict[str, Any], float]:  # fmt: skip
    """The weights after one step, and the loss that was logged for it."""
    from trl import SFTConfig

    from qlora_kit.engines.trainer_mixins import PortableLoss

    trainer_class = _trainer_class(PortableLoss)
    model = make_model("llama")
    trainer = trainer_class(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), max_steps=1, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate, learning_rate=0.1, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, logging_steps=1, bf16=False,
            gradient_checkpointing=checkpointing,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, loss


def _trainer_class(mixin: type) -> Any:
    from trl import SFTTrainer

    return type("Trainer", (mixin, SFTTrainer), {})


def test_the_step_does_not_depend_on_the_layout(tokenizer: Any, tmp_path: Path) -> None:
    dataset = _dataset(tokenizer)
    packed = pack_examples(dataset, 512)
    assert 1 < len(packed) < 8
    pad = tokenizer.pad_token_id
    start = {name: p.detach().clone() for name, p in make_model("llama").named_parameters()}
    weights, loss = _step(tokenizer, tmp_path, dataset, PaddedCollator(pad), 2, 4)
    others = {
        "8 x 1": _step(tokenizer, tmp_path, dataset, PaddedCollator(pad), 8, 1),
        "1 x 8": _step(tokenizer, tmp_path, dataset, PaddedCollator(pad), 1, 8),
        "padding-free 2 x 4": _step(tokenizer, tmp_path, dataset, PackedCollator(pad), 2, 4),
        "packed": _step(tokenizer, tmp_path, packed, PackedCollator(pad), 1, len(packed)),
        "packed, block mask": _step(
            tokenizer, tmp_path, packed, PackedCollator(pad, "block_mask"), len(packed), 1
        ),
        "packed, checkpointing": _step(
            tokenizer, tmp_path, packed, PackedCollator(pad), 1, len(packed), checkpointing=True
        ),
    }
    for name, (other, other_loss) in others.items():
        assert other_loss == pytest.approx(loss, abs=1e-4), name
        for parameter, value in weights.items():
            moved = (value - start[parameter]).abs().max().item()
            assert moved > 0
            difference = (other[parameter] - value).abs().max().item()
            assert difference <= 1e-4 * moved, (name, parameter)
