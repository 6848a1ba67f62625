"""The commands: what each loads, calls and prints, cheap checks first."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from qlora_kit.cli.output import (
    describe_failures,
    print_artifact,
    print_exporters,
    print_json,
    print_results,
)
from qlora_kit.cli.parser import read_columns, read_settings, split_names
from qlora_kit.cli.spelling import EXPORTING, FLAGS, Spelling
from qlora_kit.errors import ConfigError
from qlora_kit.manifest import to_jsonable

__all__ = ["INTERRUPTED", "RUN"]

#: The exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED: Final = 130


def _load(options: argparse.Namespace) -> Any:
    from qlora_kit import load_quantized

    return load_quantized(
        options.model,
        max_seq_length=options.max_seq_length,
        dtype=options.dtype,
        load_in_4bit=False if options.no_4bit else None,
        load_in_8bit=options.load_in_8bit,
        engine=options.engine,
        local_files_only=not options.download,
    )


# -- train -----------------------------------------------------------------------------------


def _train(options: argparse.Namespace, spelling: Spelling) -> int:
    from qlora_kit import AdaptedModel, attach_lora, export_model, train_sft
    from qlora_kit.config import AdapterConfig
    from qlora_kit.export import check_export
    from qlora_kit.training import check_training

    settings = read_settings(
        options.settings, "model", "train_dataset", "formatter", "output_dir", "packing",
        "eval_dataset", "resume_from_checkpoint",
    )  # fmt: skip
    formats = split_names(options.export)
    target = options.export_to or options.output
    export_options = read_settings(
        options.export_option, "overwrite", "path", "progress", flag="--export-option"
    )
    adapter = {"r": options.r, "lora_alpha": options.lora_alpha}
    AdapterConfig(**adapter)
    # Whatever can be wrong is said now: in the order of how soon it is known, before the model.
    if formats:
        spelling.use(EXPORTING, "--export-option", _list_format_options)
        check_export(formats, target, overwrite=options.overwrite, **export_options)
    spelling.use(FLAGS, "--set", _list_training_settings)
    data, held_out, plan = _read_data(options)
    settings |= {"output_dir": options.output, "packing": options.packing}
    settings["resume_from_checkpoint"] = options.resume or None
    check_training(has_eval=held_out is not None, **settings)

    model = _load(options)
    formatter = None if plan is None else plan.make(model.tokenizer)
    if not isinstance(model, AdaptedModel):
        model = attach_lora(model, **adapter)
    result = train_sft(model, data, formatter=formatter, eval_dataset=held_out, **settings)
    if not options.json:
        print(result)
    if result.was_interrupted:
        if options.json:
            print_json({"training": result, "exports": [], "failures": {}})
        sys.stderr.write(
            f"Stopped, nothing was exported. The same command with --resume goes on from "
            f"{result.checkpoint}.\n"
            if result.checkpoint
            else "Stopped before the first step was done; there is nothing to go on from.\n"
        )
        return INTERRUPTED
    if not formats:
        if options.json:
            print_json({"training": result, "exports": [], "failures": {}})
        return 0
    spelling.use(EXPORTING, "--export-option", _list_format_options)
    results = export_model(model, formats, target, overwrite=options.overwrite, **export_options)
    if not options.json:
        return print_results(results, spelling)
    failures = describe_failures(results, spelling)
    print_json({"training": result, "exports": list(results.values()), "failures": failures})
    return 1 if failures else 0


def _read_data(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The rows to train on and to evaluate on, and what formats them if that was said."""
    from qlora_kit.data import plan_formatter, read_source

    offline = not options.download
    data = read_source(options.data, options.split, local_files_only=offline)
    held_out = None
    if options.eval_data is not None:
        split = options.eval_split or options.split
        held_out = read_source(options.eval_data, split, local_files_only=offline)
    said = {
        "template": options.template,
        "columns": read_columns(options.columns),
        "system": options.system,
        "response_only": options.response_only,
        "eos_token": options.eos_token,
        "on_bad_rows": options.on_bad_rows,
    }
    if "input_ids" in data.columns:
        flags = [f"--{name.replace('_', '-')}" for name, value in said.items() if value is not None]
        if flags:
            raise ConfigError(
                f"{data.label} holds token ids, which are trained as they are. Leave out "
                f"{', '.join(flags)}."
            )
        return data, held_out, None
    plan = plan_formatter(data.columns, **said)
    for rows in (data, held_out):
        if rows is not None:
            plan.check(rows)
    # Nothing said is left to train_sft, which knows what not to remember.
    return data, held_out, plan if any(value is not None for value in said.values()) else None


def _list_training_settings() -> set[str]:
    from qlora_kit import train_sft

    names = set(inspect.signature(train_sft).parameters)
    trl: Any = sys.modules.get("trl")
    if trl is not None:
        names |= {field.name for field in dataclasses.fields(trl.SFTConfig)}
    return names


# -- generate --------------------------------------------------------------------------------


def _generate(options: argparse.Namespace, spelling: Spelling) -> None:
    from qlora_kit import generate_stream
    from qlora_kit.data import plan_formatter

    spelling.use(FLAGS, "--set", _list_generation_settings)
    settings = read_settings(options.settings, "model", "prompt", "max_new_tokens")
    plan = None
    if options.template is not None:
        plan = plan_formatter(template=options.template, system=options.system)
    elif options.system is not None:
        raise ConfigError(
            "--system goes with --template: what a model was trained with has a system text of "
            "its own."
        )
    model = _load(options)
    formatter = model.record.formatter
    if plan is not None:
        formatter = plan.make(model.tokenizer)
    elif formatter is None:
        # What the model's makers trained it with, if they did; else the plainest of instructions.
        template = "chat" if model.tokenizer.chat_template else "alpaca"
        formatter = plan_formatter(template=template).make(model.tokenizer)
        sys.stderr.write(
            f"{options.model} does not say how it was trained; asking with --template {template}.\n"
        )
    prompt = formatter.prompt(options.instruction, options.input)
    text, chunk = "", None
    for chunk in generate_stream(model, prompt, max_new_tokens=options.max_new_tokens, **settings):
        text += chunk.text
        if not options.json:
            print(chunk.text, end="", flush=True)
    if not options.json:
        print()
    elif chunk is not None:
        print_json({**to_jsonable(chunk), "text": text})


def _list_generation_settings() -> set[str]:
    from qlora_kit import generate_stream

    names = set(inspect.signature(generate_stream).parameters)
    transformers: Any = sys.modules.get("transformers")
    return names if transformers is None else names | set(vars(transformers.GenerationConfig()))


# -- export ----------------------------------------------------------------------------------


def _export(options: argparse.Namespace, spelling: Spelling) -> int:
    from qlora_kit import export_model
    from qlora_kit.export import check_export

    settings = read_settings(options.settings, "overwrite", "path", "progress")
    formats = split_names(options.format)
    asked: Any = formats[0] if len(formats) == 1 else formats
    spelling.use(EXPORTING, "--set", _list_format_options)
    check_export(asked, options.path, overwrite=options.overwrite, **settings)
    spelling.use(FLAGS)
    model = _load(options)
    spelling.use(EXPORTING, "--set", _list_format_options)
    results = export_model(model, asked, options.path, overwrite=options.overwrite, **settings)
    if len(formats) != 1:
        if not options.json:
            return print_results(results, spelling)
        failures = describe_failures(results, spelling)
        print_json({"exports": list(results.values()), "failures": failures})
        return 1 if failures else 0
    if options.json:
        print_json({"exports": [results], "failures": {}})
    else:
        print_artifact(results)
    return 0


def _list_format_options() -> set[str]:
    from qlora_kit import describe_exporters

    exporters = describe_exporters()["exporters"]
    return {"verify"} | {option["name"] for entry in exporters for option in entry["options"]}


def _exporters(options: argparse.Namespace, spelling: Spelling) -> None:
    from qlora_kit import describe_exporters

    described = describe_exporters()
    if options.json:
        print_json(described)
    else:
        print_exporters(described)


#: Each command; it returns the exit status, ``None`` for 0.
RUN: Final[Mapping[str, Callable[[argparse.Namespace, Spelling], int | None]]] = {
    "train": _train,
    "generate": _generate,
    "export": _export,
    "exporters": _exporters,
}
