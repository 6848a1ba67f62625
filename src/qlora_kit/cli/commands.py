"""The commands: what each loads, calls and prints, cheap checks first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from qlora_kit.cli.arguments import read_arguments
from qlora_kit.cli.completion import write_completion
from qlora_kit.cli.flags import FlagWriter
from qlora_kit.cli.lists import takes_export_list, takes_generation_list, takes_training_list
from qlora_kit.cli.output import (
    describe_failures,
    print_artifact,
    print_exporters,
    print_json,
    print_results,
)
from qlora_kit.cli.parser import list_commands, make_parser
from qlora_kit.cli.values import read_columns, read_settings, split_names
from qlora_kit.errors import ConfigError
from qlora_kit.manifest import to_jsonable

__all__ = ["INTERRUPTED", "RUN"]

#: The exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED: Final = 130


def _loading_arguments(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "max_seq_length": options.max_seq_length,
        "dtype": options.dtype,
        "load_in_4bit": False if options.no_4bit else None,
        "load_in_8bit": options.load_in_8bit or None,
        "engine": options.engine,
        "local_files_only": False if options.download else None,
        **read_arguments(options, "model"),
    }
    return {name: value for name, value in given.items() if value is not None}


def _load(options: argparse.Namespace) -> Any:
    from qlora_kit import load_quantized

    return load_quantized(options.model, **_loading_arguments(options))


# -- train -----------------------------------------------------------------------------------


def _train(options: argparse.Namespace, write: FlagWriter) -> int:
    from qlora_kit.pipeline import Pipeline, check_pipeline, run_pipeline

    adapter = read_arguments(options, "adapter")
    settings = read_settings(
        options.settings, "model", "train_dataset", "formatter", "output_dir", "eval_dataset",
        "resume_from_checkpoint", takes_list=takes_training_list,
    )  # fmt: skip
    training = read_arguments(options, "training")
    for name in training.keys() & settings.keys():
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name} was given twice, by {flag} and by --set. Give one of the two.")
    pipeline = Pipeline(
        model=options.model,
        data=options.data,
        split=options.split or "train",
        eval_data=options.eval_data,
        eval_split=options.eval_split,
        loading=_loading_arguments(options),
        adapter=adapter,
        formatting={
            "template": options.template,
            "columns": read_columns(options.columns),
            "system": options.system,
            "response_only": options.response_only,
            "eos_token": options.eos_token,
            "on_bad_rows": options.on_bad_rows,
        },
        training={
            **settings,
            **training,
            "output_dir": options.output or "outputs",
            "resume_from_checkpoint": options.resume or None,
        },
        exports=split_names("lora" if options.export is None else options.export),
        export_path=options.export_to,
        export_options=read_settings(
            options.export_option, "overwrite", "path", "progress", flag="--export-option",
            takes_list=takes_export_list,
        ),
        overwrite=options.overwrite,
    )  # fmt: skip
    checked = check_pipeline(pipeline)
    result = run_pipeline(checked, on_trained=None if options.json else print)
    exports = {} if result.exports is None else result.exports
    failures = {} if result.exports is None else describe_failures(result.exports, write)
    if options.json:
        made = {"training": result.training, "exports": list(exports.values())}
        print_json({**made, "failures": failures})
    if result.training.was_interrupted:
        sys.stderr.write(
            f"Stopped, nothing was exported. The same command with --resume goes on from "
            f"{result.training.checkpoint}.\n"
            if result.training.checkpoint
            else "Stopped before the first step was done; there is nothing to go on from.\n"
        )
        return INTERRUPTED
    if result.exports is None:
        return 0
    return int(bool(failures)) if options.json else print_results(result.exports, write)


# -- generate --------------------------------------------------------------------------------


def _generate(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit import generate_stream
    from qlora_kit.data import plan_formatter

    settings = read_settings(
        options.settings, "model", "prompt", "max_new_tokens", takes_list=takes_generation_list
    )
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


# -- export ----------------------------------------------------------------------------------


def _export(options: argparse.Namespace, write: FlagWriter) -> int:
    from qlora_kit import export_model
    from qlora_kit.export import check_export

    settings = read_settings(
        options.settings, "overwrite", "path", "progress", takes_list=takes_export_list
    )
    formats = split_names(options.format)
    asked: Any = formats[0] if len(formats) == 1 else formats
    check_export(asked, options.path, overwrite=options.overwrite, **settings)
    model = _load(options)
    results = export_model(model, asked, options.path, overwrite=options.overwrite, **settings)
    if len(formats) != 1:
        if not options.json:
            return print_results(results, write)
        failures = describe_failures(results, write)
        print_json({"exports": list(results.values()), "failures": failures})
        return 1 if failures else 0
    if options.json:
        print_json({"exports": [results], "failures": {}})
    else:
        print_artifact(results)
    return 0


def _exporters(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit import describe_exporters

    described = describe_exporters()
    if options.json:
        print_json(described)
    else:
        print_exporters(described)


def _templates(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit.data import describe_templates

    described = describe_templates()
    if options.json:
        print_json(described)
        return
    for entry in described:
        print(f"{entry['name']:<18} {entry['summary']}")


def _completion(options: argparse.Namespace, write: FlagWriter) -> None:
    print(write_completion(options.shell, list_commands(make_parser())), end="")


#: Each command; it returns the exit status, ``None`` for 0.
RUN: Final[Mapping[str, Callable[[argparse.Namespace, FlagWriter], int | None]]] = {
    "train": _train,
    "generate": _generate,
    "export": _export,
    "exporters": _exporters,
    "templates": _templates,
    "completion": _completion,
}
