"""What fits where: the table of docs/plan.md, made by ``plan_training``.

    python benchmarks/plan_table.py

Each cell is the longest row, in tokens, with which a training fits the card: 4 bits, rank 16 on all
projections, 2 x 4 rows of that length, everything else automatic. No weight is read.
"""

import json
import tempfile
from pathlib import Path

from qlora_kit import Pipeline, plan_training

#: Qwen3's sizes: width, layers, heads, MLP, and whether head and embedding are one.
SIZES = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}
CARDS = ("8GB", "RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4090", "A100 40GB", "H100", "H200")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def write_config(folder: Path, size: str) -> Path:
    hidden, layers, heads, intermediate, tied = SIZES[size]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": intermediate, "vocab_size": 151936,
        "tie_word_embeddings": tied, "hidden_act": "silu", "max_position_embeddings": 40960,
    }  # fmt: skip
    path = folder / size
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def find_longest(model: Path, card: str) -> str:
    for length in reversed(LENGTHS):
        asked = Pipeline(model=model, data=None, loading={"max_seq_length": length})
        if plan_training(asked, card=card, row_tokens=length).fits:
            return f"{length:,}"
    return "–"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"| Qwen3 | {' | '.join(CARDS)} |")
        print("|---|" + "---|" * len(CARDS))
        for size in SIZES:
            model = write_config(Path(folder), size)
            print(f"| {size} | {' | '.join(find_longest(model, card) for card in CARDS)} |")


if __name__ == "__main__":
    main()
