"""Short runs through ``train_sft``, in as many processes as a launcher starts.

    python train_on_ranks.py BASE FOLDER '{"name": {"plan": {"enabled": true}}}'

Each rank writes ``FOLDER/NAME-RANK.pt``: losses, token counts and the adapter's weights. Names
that end in ``!`` also export.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from checkpoints import randomize
from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized, train_sft
from qlora_kit.engines.native.fast.step_runner import StepRunner
from qlora_kit.engines.native.sharding.shards import held_bytes
from qlora_kit.ranks import find_place

ROWS = [
    {"instruction": "Say " * (1 + n % 3), "input": "", "output": "hello world " * (1 + n * 5 % 7)}
    for n in range(21)
]


class StopOneRank(TrainerCallback):
    """A signal to the last rank alone, in its second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and find_place().rank == 1:
            signal.raise_signal(signal.SIGINT)


class DieOnce(TrainerCallback):
    """The last rank is killed in its fifth step, the first time that it is started."""

    def on_step_begin(self, args, state, control, **kwargs):
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if is_first and state.global_step == 4 and find_place().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def running_out(rank):
    """One rank has no memory for its third micro-batch, once."""
    compute, left = StepRunner._run_plainly, [3]

    def run(self, *arguments):
        left[0] -= 1
        if left[0] == 0 and find_place().rank == rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return compute(self, *arguments)

    StepRunner._run_plainly = run
    try:
        yield
    finally:
        StepRunner._run_plainly = compute


class MeasureHeld(TrainerCallback):
    """How much of the base this rank holds while it trains."""

    def __init__(self, model):
        self.model, self.held = model, 0

    def on_step_end(self, *args, **kwargs):
        self.held = held_bytes(self.model)


def main(base: str, folder: str, runs: dict[str, dict[str, object]]) -> None:
    rank = find_place().rank
    for name, settings in runs.items():
        settings = dict(settings)
        loaded_in_4bit = settings.pop("load_in_4bit", True)
        stops, rows = settings.pop("stops", False), settings.pop("rows", len(ROWS))
        dies, runs_out = settings.pop("dies", False), settings.pop("runs_out", False)
        evaluates = settings.pop("evaluates", False)
        shard, folder_of = settings.pop("shard", "auto"), settings.pop("base", base)
        loaded = load_quantized(folder_of, 128, "float32", loaded_in_4bit, shard=shard)
        loaded_bytes = held_bytes(loaded.model)
        adapter = {name: settings.pop(name) for name in ("use_dora", "modules_to_save")
                   if name in settings}  # fmt: skip
        model = randomize(attach_lora(loaded, r=4, **adapter))
        formatter = AlpacaFormatter(
            model.tokenizer, "{instruction}{input}|{output}", response_only=True
        )
        with running_out(1) if runs_out else contextlib.nullcontext():
            result = train_sft(
                model, formatter.load(ROWS[:rows]),
                eval_dataset=formatter.load(ROWS[:7]) if evaluates else None,
                output_dir=Path(folder) / settings.pop("output_dir", f"run-{name.strip('!')}"),
                callbacks=[held := MeasureHeld(model.model), *([StopOneRank()] if stops else []),
                           *([DieOnce()] if dies else [])],
                disable_tqdm=True, report_to="none",
                **{"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "constant",
                   "warmup_steps": 0, "max_steps": 6, "save_strategy": "no", **settings},
            )  # fmt: skip
        artifact = None
        if name.endswith("!"):
            artifact = export_model(model, "lora", Path(folder) / "exported")
        weights = {n: p.detach().cpu() for n, p in model.model.named_parameters()
                   if p.requires_grad}  # fmt: skip
        found = {
            "losses": result.losses, "tokens": (result.tokens_seen, result.trained_tokens),
            "samples": [sample.answer for sample in result.samples],
            "eval": result.eval_losses, "plan": result.plan, "steps": result.steps,
            "interrupted": result.was_interrupted, "checkpoint": str(result.checkpoint),
            "held": held.held, "whole": held_bytes(model.model), "loaded": loaded_bytes,
            "weights": weights, "exported": artifact and len(artifact.files),
        }  # fmt: skip
        torch.save(found, Path(folder) / f"{name.strip('!')}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
