"""Flags that are read off the functions they belong to: their names, kinds and help.

A flag of ``attach_lora`` exists because the function has the argument; what it says is what the
docstring says.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from qlora_kit.adapters import attach_lora
from qlora_kit.cli.values import read_list, read_mapping, read_value
from qlora_kit.loading import load_quantized
from qlora_kit.messages import Owner
from qlora_kit.training import train_sft

__all__ = ["Argument", "add_arguments", "list_arguments", "read_arguments"]

Kind = Literal["switch", "value", "text", "list", "mapping"]

#: The fields of ``SFTConfig`` that people set most, by the classic script's names.
_TRAINING_FIELDS: Final[Mapping[str, tuple[Kind, str]]] = {
    "max_steps": ("value", "optimizer steps (60)"),
    "num_train_epochs": ("value", "passes over the data instead"),
    "per_device_train_batch_size": ("value", "rows of a micro-batch (2)"),
    "gradient_accumulation_steps": ("value", "micro-batches of a step (4)"),
    "learning_rate": ("value", "the highest one (2e-4)"),
    "lr_scheduler_type": ("text", "linear, cosine, constant and others (linear)"),
    "warmup_steps": ("value", "steps until it is reached (5)"),
    "weight_decay": ("value", "(0.01)"),
    "optim": ("text", "(adamw_8bit where the device has it)"),
    "max_grad_norm": ("value", "gradients are clipped to it (1)"),
    "neftune_noise_alpha": ("value", "noise on embeddings"),
    "seed": ("value", "order of rows and dropout (3407)"),
    "max_length": ("value", "longest example in tokens (--max-seq-length)"),
    "padding_free": ("switch", "rows joined instead of padded"),
    "gradient_checkpointing": ("switch", "recompute activations; by default by memory"),
    "dataset_num_proc": ("value", "processes that tokenize"),
    "logging_steps": ("value", "steps between log records (1)"),
    "save_strategy": ("text", "steps, epoch, best or no (steps)"),
    "save_steps": ("value", "steps between checkpoints (500)"),
    "save_total_limit": ("value", "checkpoints of this run to keep (all)"),
    "eval_strategy": ("text", "steps, epoch or no"),
    "eval_steps": ("value", "steps between evaluations (a quarter of the run)"),
    "per_device_eval_batch_size": ("value", "rows evaluated at once"),
    "load_best_model_at_end": ("switch", "end with the best checkpoint's weights"),
    "report_to": ("list", "trackers, such as wandb,tensorboard (none)"),
    "run_name": ("text", "the run's name in trackers"),
}

_TRAINING: Final = (
    "packing", "truncation", "plan", "sample_prompts", "sample_steps", "resume_with_changes",
)  # fmt: skip
_LOADING: Final = ("base", "revision", "cache_dir", "trust_remote_code")


@dataclass(frozen=True)
class Argument:
    """An argument of the library that has a flag of its own.

    Attributes:
        section: The part of a recipe that it belongs to.
        of: The function.
        name: Its name there.
        kind: How its value is read.
        help: What it does.
    """

    section: str
    of: Owner
    name: str
    kind: Kind
    help: str

    @property
    def flag(self) -> str:
        """The flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def dest(self) -> str:
        """Where argparse keeps its value."""
        return f"{self.section}.{self.name}"

    def read(self, text: str) -> Any:
        """A value as it was typed."""
        if self.kind == "mapping":
            return read_mapping(text, self.flag)
        readers: dict[str, Callable[[str], Any]] = {"value": read_value, "list": read_list}
        value = readers.get(self.kind, str)(text)
        # What is a word, a switch or options, as train_sft's plan is.
        is_options = self.kind == "value" and isinstance(value, str) and "=" in value
        return read_mapping(text, self.flag) if is_options else value


@cache
def list_arguments() -> tuple[Argument, ...]:
    """Every argument that has a generated flag."""
    return (
        *_read_function("model", "load_quantized", load_quantized, _LOADING),
        *_read_function("adapter", "attach_lora", attach_lora, leave_out=("max_seq_length",)),
        *(
            Argument("training", "train_sft", name, kind, text)
            for name, (kind, text) in _TRAINING_FIELDS.items()
        ),
        *_read_function("training", "train_sft", train_sft, _TRAINING),
    )


def add_arguments(parser: Any, section: str) -> None:
    """Add the flags of one section to a parser or a group of it."""
    for argument in list_arguments():
        if argument.section != section:
            continue
        options: dict[str, Any] = {"dest": argument.dest, "default": None, "help": argument.help}
        if argument.kind == "switch":
            parser.add_argument(argument.flag, action=argparse.BooleanOptionalAction, **options)
        else:
            name = {"list": "A,B", "mapping": "NAME=VALUE"}.get(argument.kind, "VALUE")
            parser.add_argument(argument.flag, metavar=name, **options)


def read_arguments(options: argparse.Namespace, section: str) -> dict[str, Any]:
    """What was given for one section.

    Raises:
        ConfigError: When a value cannot be read.
    """
    given: dict[str, Any] = {}
    for argument in list_arguments():
        value = getattr(options, argument.dest, None)
        if argument.section == section and value is not None:
            given[argument.name] = argument.read(value) if isinstance(value, str) else value
    return given


def _read_function(
    section: str,
    of: Owner,
    function: Callable[..., Any],
    names: tuple[str, ...] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Iterator[Argument]:
    described = _describe(function)
    # The first one is the model.
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        name = parameter.name
        is_chosen = name not in leave_out if names is None else name in names
        if not is_chosen or parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = parameter.default
        shown = f" ({default})" if isinstance(default, int | float | str) else ""
        kind = _choose_kind(str(parameter.annotation), default)
        text = described[name] + (shown if kind != "switch" else "")
        yield Argument(section, of, name, kind, text)


def _choose_kind(annotation: str, default: Any) -> Kind:
    if annotation == "bool":
        return "switch"
    if "Mapping" in annotation:
        return "mapping"
    if "Sequence" in annotation:
        return "list"
    is_text = "str" in annotation and "bool" not in annotation and not isinstance(default, int)
    return "text" if is_text else "value"


def _describe(function: Callable[..., Any]) -> dict[str, str]:
    """The first sentence of what a docstring says of each argument, for argparse."""
    text = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    described = {}
    for name, said in re.findall(r"^    (\w+): (.*?)(?=^    \S|\Z)", text, re.M | re.S):
        sentence = re.split(r"(?<=[a-z\d`)\]])[.;] ", " ".join(said.split()))[0].rstrip(".")
        plain = re.sub(r"`+|:\w+:|~[\w.]+\.", "", sentence)
        described[name] = (plain[0].lower() + plain[1:]).replace("%", "%%")
    return described
