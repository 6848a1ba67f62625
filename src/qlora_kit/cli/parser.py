"""What the command line takes; what was not given is ``None``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from qlora_kit import __version__
from qlora_kit.boundaries import hide_secrets
from qlora_kit.cli.arguments import add_arguments
from qlora_kit.cli.chat import add_chat_flags
from qlora_kit.cli.completion import SHELLS
from qlora_kit.cli.generating import add_file_flags
from qlora_kit.errors import did_you_mean

__all__ = ["CommandParser", "list_commands", "make_parser", "parse"]

_PROGRAM: Final = "qlora-kit"


class CommandParser(argparse.ArgumentParser):
    """A parser that takes flags by their whole names and says which ones are near."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and which names would be right."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        near = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        super().error(hide_secrets(message) + near)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command; unknown ones end the program with what is near them."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands = list_commands(parser)
        said = [_explain(word, options.command, commands) for word in unknown if word[:1] == "-"]
        commands[options.command].error(
            " ".join(said) or f"what is {' '.join(unknown)}? See --help."
        )
    return options


def list_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def _explain(word: str, command: str, commands: dict[str, argparse.ArgumentParser]) -> str:
    flag = word.partition("=")[0]
    name = flag.strip("-").replace("-", "_")
    if command in ("train", "plan") and name in _list_training_fields():
        return f"{flag} has no flag of its own; give it as --set {name}=VALUE."
    own = [name for name in commands[command]._option_string_actions if name.startswith("--")]
    others = [name for name, p in commands.items() if flag in p._option_string_actions]
    hint = did_you_mean(flag, own)
    if others:
        hint = f" It is a flag of {', '.join(others)}."
    return f"There is no {flag}.{hint or ' See --help.'}"


def _list_training_fields() -> set[str]:
    import dataclasses

    from trl import SFTConfig

    return {field.name for field in dataclasses.fields(SFTConfig)}


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; ``command`` says which was given."""
    parser = CommandParser(
        prog=_PROGRAM, description="Fine-tune a language model with QLoRA and export it."
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_train(commands)
    _add_plan(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_export(commands)
    _add_json(commands.add_parser("exporters", help="list the export formats"))
    _add_evaluate(commands)
    doctor = commands.add_parser("doctor", help="look at this machine: what works, what to do")
    doctor.add_argument("--network", action="store_true", help="ask the hub whether it answers")
    _add_json(doctor)
    _add_json(commands.add_parser("templates", help="list what --template takes by name"))
    report = commands.add_parser("report", help="write a run's report.html, exports included")
    report.add_argument("output", help="the output folder of the run")
    recipe = commands.add_parser("recipe", help="write the recipe that repeats a past run")
    recipe.add_argument(
        "--from-run", required=True, metavar="OUTPUT", help="the output folder of the run"
    )
    recipe.add_argument("path", nargs="?", help="the file to write; without it, it is printed")
    completion = commands.add_parser("completion", help="a script that completes flags in a shell")
    completion.add_argument("shell", choices=SHELLS)
    for command in commands.choices.values():
        # After the command as well as before it, where it must not undo the other.
        command.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
            help="say what is being done",
        )  # fmt: skip
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a LoRA adapter",
        usage="%(prog)s MODEL DATA [options]\n       %(prog)s RECIPE [options]",
    )
    train.add_argument(
        "--nproc", metavar="N",
        help="train in so many processes, one a card; auto for all cards of this machine",
    )  # fmt: skip
    _add_pipeline(train)
    _add_json(train)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a training will take, without reading a weight",
        usage="%(prog)s MODEL [DATA] [options]\n       %(prog)s RECIPE [options]",
    )
    plan.add_argument(
        "--card", action="append", default=[], metavar="NAME",
        help="'RTX 3060 12GB', 24GB, ...; several times for several; this machine by default",
    )  # fmt: skip
    plan.add_argument(
        "--nproc", metavar="N", help="so many cards together; auto for all cards of this machine"
    )
    plan.add_argument("--row-tokens", type=int, help="tokens of a row, where no data is given")
    _add_pipeline(plan)
    _add_json(plan)


def _add_pipeline(train: argparse.ArgumentParser) -> None:
    _add_model(train, "; or a recipe's .toml or .yaml file, with the data in it")
    train.add_argument(
        "data", nargs="?", help=".json, .jsonl, .csv, .parquet, a folder, a pattern or a hub name"
    )
    _add_data(train)
    add_arguments(train.add_argument_group("adapter"), "adapter")
    training = train.add_argument_group("training")
    training.add_argument(
        "--output", "--output-dir", dest="output", help="checkpoints and the manifest (outputs)"
    )
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    training.add_argument(
        "--auto-resume", dest="resume", action="store_const", const="auto",
        help="go on from the last checkpoint where there is one, and start where not",
    )  # fmt: skip
    add_arguments(training, "training")
    _add_settings(
        training,
        "any other SFTConfig field, for example adam_beta2=0.99; any setting of a recipe with its "
        "section, for example data.eval_fraction=0.1",
    )
    export = train.add_argument_group("export")
    export.add_argument(
        "--export", help="formats to export afterwards, by comma (lora); '' for none"
    )
    export.add_argument("--export-to", help="default: OUTPUT/FORMAT")
    export.add_argument(
        "--export-option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the formats, for example quantization=q4_k_m,q8_0",
    )  # fmt: skip
    export.add_argument("--overwrite", action="store_true", help="replace earlier exports")


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="answer an instruction, or a file of them")
    _add_model(generate)
    generate.add_argument("instruction", nargs="?")
    generate.add_argument(
        "--input", default="", help="the instruction's input; without one, a file of rows"
    )
    add_file_flags(generate)
    _add_template(generate, "what the model was trained with, where that is known")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    _add_json(generate)
    _add_settings(generate, "any GenerationConfig field, for example temperature=0.7")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="loss and answers over held-out rows")
    _add_model(evaluate)
    evaluate.add_argument("data", help="rows, as for train")
    evaluate.add_argument("--compare", metavar="MODEL", help="another model, such as the base")
    evaluate.add_argument("--metrics", help="by comma: exact_match, contains (both)")
    evaluate.add_argument("--regex", help="a pattern whose first group must be the same")
    evaluate.add_argument(
        "--answers", action=argparse.BooleanOptionalAction, default=True,
        help="whether to ask for answers, or compute losses alone",
    )  # fmt: skip
    evaluate.add_argument("--max-new-tokens", type=int, default=128)
    evaluate.add_argument("--batch-size", type=int, default=8, help="rows at once for the loss (8)")
    evaluate.add_argument("--limit", type=int, help="look at the first so many rows only")
    evaluate.add_argument("--split", help="which split of the data (train)")
    _add_template(evaluate, "what the model was trained with, else the columns")
    _add_json(evaluate)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk with a model")
    _add_model(chat)
    _add_template(chat, "what the model was trained with, where that is known")
    add_chat_flags(chat)
    _add_settings(chat, "any GenerationConfig field, for example temperature=0.7")


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a model in another format")
    _add_model(export)
    export.add_argument("format", help="one, or several by comma; see `qlora-kit exporters`")
    export.add_argument(
        "path", nargs="?", help="the folder to write; several formats get one each inside it"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    _add_json(export)
    _add_settings(export, "the format's own options, for example quantization=q4_k_m,q8_0")


def _add_model(parser: argparse.ArgumentParser, beside: str = "") -> None:
    parser.add_argument(
        "model", help=f"a folder, an adapter's folder, a .gguf file or a hub name{beside}"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--max-seq-length", type=int, help="longest sequence in tokens (2048)")
    model.add_argument("--dtype", help="bfloat16, float16 or float32")
    bits = model.add_mutually_exclusive_group()
    bits.add_argument("--no-4bit", action="store_true", help="keep 16-bit weights")
    bits.add_argument("--load-in-8bit", action="store_true", help="8 bits instead of 4")
    model.add_argument("--engine", help="auto, native or unsloth (auto)")
    model.add_argument(
        "--download", action="store_true", help="allow downloading what has a hub name"
    )
    add_arguments(model, "model")


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
    data.add_argument("--eos-token", help="the token that ends an answer")
    data.add_argument(
        "--on-bad-rows", choices=("raise", "skip"),
        help="what to do about rows that cannot be used (raise)",
    )  # fmt: skip
    data.add_argument("--split", help="which split of the data (train)")
    data.add_argument("--eval-data", help="held-out rows to evaluate on")
    data.add_argument("--eval-fraction", type=float, help="a share of the data to hold out instead")
    data.add_argument("--eval-split", help="which split of them (that of the data)")


def _add_template(parser: Any, otherwise: str) -> None:
    parser.add_argument(
        "--template",
        help="a name (see `qlora-kit templates`), a file with {instruction}, "
        f"{{input}} and {{output}}, or a chat template's .jinja file; default: {otherwise}",
    )
    parser.add_argument("--system", help="the template's system text")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_settings(parser: Any, what: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help=what
    )
