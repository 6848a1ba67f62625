"""Two other ways to write a row as text: a template of your own, and the model's chat template.

    python examples/own_template.py MODEL [--steps 20] [--output templates]

Whichever formats the rows also writes the prompts, so the two cannot drift apart; exports
carry it along.
"""

import argparse
import json
from pathlib import Path

from qlora_kit import AlpacaFormatter, ChatFormatter, attach_lora, load_quantized, train_sft
from qlora_kit import generate_stream as stream

DATA = Path(__file__).resolve().parent / "field_guide.json"

#: The end token is appended once, by the formatter. {input} is left empty where a row has none.
TEMPLATE = "Question: {instruction} {input}\nAnswer: {output}"


def train(args, name, make_formatter, rows):
    model = attach_lora(load_quantized(args.model, max_seq_length=512), r=8)
    formatter = make_formatter(model.tokenizer)
    loaded = formatter.load(rows)
    print(f"\n{name}: a row becomes\n{formatter.preview(loaded, n=1)}")
    train_sft(model, loaded, max_steps=args.steps, output_dir=Path(args.output) / name)
    return model, formatter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a model folder, .gguf file or hub name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="templates")
    args = parser.parse_args()
    rows = json.loads(DATA.read_text(encoding="utf-8"))

    model, formatter = train(
        args,
        "own",
        lambda tokenizer: AlpacaFormatter(tokenizer, TEMPLATE, response_only=True),
        rows,
    )
    prompt = formatter.prompt("Write a field guide entry.", "Walrus")
    print("".join(chunk.text for chunk in stream(model, prompt, max_new_tokens=60)))

    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"{row['instruction']} {row['input']}".strip()},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]
    # Only the assistant's turns carry loss, its end-of-turn token included.
    model, _ = train(args, "chat", ChatFormatter, conversations)
    messages = [{"role": "user", "content": "Write a field guide entry. Walrus"}]
    print("".join(chunk.text for chunk in stream(model, messages, max_new_tokens=60)))


if __name__ == "__main__":
    main()
