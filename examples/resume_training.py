"""Stop a training in the middle and go on later, as if nothing had happened.

Ctrl-C does the same by hand: the step in hand is finished, a checkpoint is saved, and
``train_sft`` returns what was done, with ``was_interrupted`` and ``checkpoint`` set.

    python examples/resume_training.py MODEL [--steps 20] [--output resumed]
"""

import argparse
from pathlib import Path

from transformers import TrainerCallback

from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft

DATA = Path(__file__).resolve().parent / "field_guide.json"


class StopHalfway(TrainerCallback):
    """Ends training as a machine that is needed elsewhere would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps // 2:
            control.should_save = control.should_training_stop = True


def train(args, **options):
    """A fresh process would do exactly this: load, attach alike, train."""
    model = attach_lora(load_quantized(args.model, max_seq_length=512), r=8)
    formatter = AlpacaFormatter(model.tokenizer, response_only=True)
    return train_sft(
        model, formatter.load(DATA), max_steps=args.steps, output_dir=args.output, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a model folder, .gguf file or hub name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="resumed")
    args = parser.parse_args()

    first = train(args, callbacks=[StopHalfway()])
    print(f"Stopped after {first.steps} of {args.steps} steps, loss {first.losses[-1]:.3f}")
    # The order of the data, the optimizer's moments and the learning rate all continue.
    rest = train(args, resume_from_checkpoint=True)
    print(f"Went on to step {rest.steps}, loss {rest.losses[0]:.3f} -> {rest.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
