"""What the command line takes, and how its values are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from qlora_kit import __version__
from qlora_kit.errors import ConfigError

__all__ = ["make_parser", "read_columns", "read_settings", "split_names"]


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; ``command`` says which was given."""
    parser = argparse.ArgumentParser(
        prog="qlora-kit", description="Fine-tune a language model with QLoRA and export it."
    )
    parser.add_argument("--version", action="version", version=f"qlora-kit {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    train = commands.add_parser("train", help="train a LoRA adapter")
    _add_model(train)
    train.add_argument("data", help=".json, .jsonl, .csv, .parquet, a folder or a hub name")
    _add_data(train)
    train.add_argument("--output", default="outputs", help="checkpoints and the manifest")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument(
        "--auto-resume", dest="resume", action="store_const", const="auto",
        help="go on from the last checkpoint where there is one, and start where not",
    )  # fmt: skip
    train.add_argument("--r", type=int, default=None, help="rank of a new adapter (16)")
    train.add_argument(
        "--lora-alpha", type=float, default=None, help="its scale times the rank (16)"
    )
    train.add_argument("--packing", action="store_true", help="several examples in a row")
    train.add_argument(
        "--export", default="lora", help="formats to export afterwards, by comma; '' for none"
    )
    train.add_argument("--export-to", default=None, help="default: OUTPUT/FORMAT")
    train.add_argument(
        "--export-option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the formats, for example quantization=q4_k_m",
    )  # fmt: skip
    train.add_argument("--overwrite", action="store_true", help="replace earlier exports")
    _add_json(train)
    _add_settings(train, "any SFTConfig field, for example max_steps=200")

    generate = commands.add_parser("generate", help="answer one instruction")
    _add_model(generate)
    generate.add_argument("instruction")
    generate.add_argument("--input", default="", help="the instruction's input")
    _add_template(generate, "what the model was trained with, where that is known")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    _add_json(generate)
    _add_settings(generate, "any GenerationConfig field, for example temperature=0.7")

    export = commands.add_parser("export", help="write a model in another format")
    _add_model(export)
    export.add_argument("format", help="one, or several by comma; see `qlora-kit exporters`")
    export.add_argument(
        "path", nargs="?", help="the folder to write; several formats get one each inside it"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    _add_json(export)
    _add_settings(export, "the format's own options, for example quantization=q4_k_m")

    _add_json(commands.add_parser("exporters", help="list the export formats"))
    for command in commands.choices.values():
        # After the command as well as before it, where it must not undo the other.
        command.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
            help="say what is being done",
        )  # fmt: skip
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, an adapter's folder, a .gguf file or a hub name")
    parser.add_argument(
        "--max-seq-length", type=int, default=2048, help="longest sequence in tokens (2048)"
    )
    parser.add_argument("--dtype", default=None, help="bfloat16, float16 or float32")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--no-4bit", action="store_true", help="keep 16-bit weights")
    bits.add_argument("--load-in-8bit", action="store_true", help="8 bits instead of 4")
    parser.add_argument("--engine", default="auto", help="auto, native or unsloth")
    parser.add_argument(
        "--download", action="store_true", help="allow downloading what has a hub name"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    _add_template(data, "by the columns of the data")
    data.add_argument(
        "--columns", action="append", default=[], metavar="ROLE=COLUMN",
        help="which column holds what, for example instruction=question,output=answer",
    )  # fmt: skip
    data.add_argument(
        "--response-only", action=argparse.BooleanOptionalAction, default=None,
        help="loss on the answers alone, as chat has it by default, or on prompts too",
    )  # fmt: skip
    data.add_argument("--eos-token", default=None, help="the token that ends an answer")
    data.add_argument(
        "--on-bad-rows", choices=("raise", "skip"), default=None,
        help="what to do about rows that cannot be used (raise)",
    )  # fmt: skip
    data.add_argument("--split", default="train", help="which split of the data (train)")
    data.add_argument("--eval-data", default=None, help="held-out rows to evaluate on")
    data.add_argument("--eval-split", default=None, help="which split of them (that of the data)")


def _add_template(parser: Any, otherwise: str) -> None:
    parser.add_argument(
        "--template", default=None,
        help="alpaca, alpaca-zh, chat, prompt-completion, text, a file with {instruction}, "
        f"{{input}} and {{output}}, or a chat template's .jinja file; default: {otherwise}",
    )  # fmt: skip
    parser.add_argument("--system", default=None, help="the template's system text")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help=what
    )


def read_settings(pairs: Sequence[str], *taken: str, flag: str = "--set") -> dict[str, Any]:
    """``name=value`` pairs; values are JSON where they parse as such, text otherwise.

    Args:
        pairs: What was given.
        *taken: Names that the command line has arguments of its own for.
        flag: What they were given to.

    Raises:
        ConfigError: When one is not of the form NAME=VALUE, or its name is taken.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"{flag} takes NAME=VALUE, got {pair!r}.")
        if name in taken:
            raise ConfigError(f"{flag} {pair}: {name} has an argument of its own, see --help.")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = {"True": True, "False": False, "None": None}.get(text, text)
    return settings


def read_columns(pairs: Sequence[str]) -> dict[str, str] | None:
    """``role=column`` pairs, several by comma; ``None`` if there are none.

    Raises:
        ConfigError: When one is not of the form ROLE=COLUMN.
    """
    columns: dict[str, str] = {}
    for pair in (part for given in pairs for part in split_names(given)):
        role, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not role or not column:
            raise ConfigError(
                f"--columns takes ROLE=COLUMN, such as instruction=question, got {pair!r}."
            )
        columns[role] = column
    return columns or None


def split_names(text: str) -> list[str]:
    """Names by comma, without the space around them."""
    return [name.strip() for name in text.split(",") if name.strip()]
