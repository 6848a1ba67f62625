"""The commands: what each loads, calls and prints, cheap checks first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit import ranks
from qlora_kit.cli.asking import read_form
from qlora_kit.cli.chat import run_chat
from qlora_kit.cli.completion import write_completion
from qlora_kit.cli.flags import FlagWriter
from qlora_kit.cli.generating import answer_file
from qlora_kit.cli.lists import takes_export_list, takes_generation_list
from qlora_kit.cli.output import (
    describe_failures,
    print_answered,
    print_artifact,
    print_exporters,
    print_json,
    print_results,
)
from qlora_kit.cli.parser import list_commands, make_parser
from qlora_kit.cli.settings import read_loading, read_training
from qlora_kit.cli.values import read_settings, split_names
from qlora_kit.errors import ConfigError
from qlora_kit.manifest import to_jsonable

if TYPE_CHECKING:
    from qlora_kit.pipeline import Pipeline

__all__ = ["INTERRUPTED", "RUN", "train_in_processes"]

#: The exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED: Final = 130


def _load(options: argparse.Namespace) -> Any:
    from qlora_kit import load_quantized

    return load_quantized(options.model, **read_loading(options))


# -- train -----------------------------------------------------------------------------------


def _train(options: argparse.Namespace, write: FlagWriter) -> int:
    from qlora_kit.pipeline import check_pipeline, run_pipeline

    checked = check_pipeline(_read_pipeline(options))
    speaks = ranks.is_main()
    result = run_pipeline(checked, on_trained=print if speaks and not options.json else None)
    if not speaks:
        # The first process says it for all.
        return INTERRUPTED if result.training.was_interrupted else 0
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


def train_in_processes(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run ``train`` in as many processes as ``--nproc`` says, after the cheap checks.

    Args:
        options: What was parsed.
        arguments: What was typed.
    """
    from qlora_kit.cli.processes import count_processes, drop_flag, run_processes
    from qlora_kit.pipeline import check_pipeline

    check_pipeline(_read_pipeline(options))
    return run_processes(count_processes(options.nproc), drop_flag(arguments, "--nproc"))


def _read_pipeline(options: argparse.Namespace) -> Pipeline:
    """What a recipe and flags ask for."""
    from qlora_kit.recipes import make_pipeline, merge_recipes, read_recipe
    from qlora_kit.recipes.files import is_recipe

    if is_recipe(options.model):
        recipe = read_recipe(options.model)
        if options.data is not None:
            recipe = merge_recipes(recipe, {"data": {"train": options.data}})
    elif options.data is None and options.command == "train":
        raise ConfigError("train takes a model and data, or a recipe's .toml or .yaml file.")
    else:
        recipe = {"model": {"name": options.model}, "data": {"train": options.data}}
    return make_pipeline(merge_recipes(recipe, read_training(options)))


def _plan(options: argparse.Namespace, write: FlagWriter) -> int:
    from qlora_kit.cli.processes import read_count
    from qlora_kit.planning import plan_training

    pipeline = _read_pipeline(options)
    ranks = 1 if options.nproc is None else read_count(options.nproc)
    forecasts = [
        plan_training(pipeline, card=card, row_tokens=options.row_tokens, ranks=ranks)
        for card in options.card or [None]
    ]
    if options.json:
        print_json([one.describe() for one in forecasts])
    else:
        print("\n\n".join(map(str, forecasts)))
    return int(not all(one.fits for one in forecasts))


# -- generate --------------------------------------------------------------------------------


def _generate(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit import generate_stream

    settings = read_settings(
        options.settings, "model", "prompt", "max_new_tokens", takes_list=takes_generation_list
    )
    settings["max_new_tokens"] = options.max_new_tokens
    if options.instruction is None:
        if options.output is None:
            raise ConfigError("Give an instruction, or a file of them: --input FILE --output FILE.")
        done = answer_file(options, _load, settings)
        print_json(done) if options.json else print_answered(done)
        return
    if options.output is not None:
        raise ConfigError("--output goes with a file of rows; give no instruction beside it.")
    plan = read_form(options)
    model = _load(options)
    prompt = plan.complete(model).formatter.prompt(options.instruction, options.input)
    text, chunk = "", None
    for chunk in generate_stream(model, prompt, **settings):
        text += chunk.text
        if not options.json:
            print(chunk.text, end="", flush=True)
    if not options.json:
        print()
    elif chunk is not None:
        print_json({**to_jsonable(chunk), "text": text})


def _chat(options: argparse.Namespace, write: FlagWriter) -> None:
    settings = read_settings(
        options.settings, "model", "prompt", "max_new_tokens", takes_list=takes_generation_list
    )

    def load(options: argparse.Namespace, name: str | None = None) -> Any:
        chosen = {"model": name or options.model}
        return _load(argparse.Namespace(**{**vars(options), **chosen}))

    run_chat(options, load, {**settings, "max_new_tokens": options.max_new_tokens})


# -- evaluate --------------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit import evaluate, load_quantized
    from qlora_kit.data import formatter_from_spec, plan_formatter, read_source
    from qlora_kit.evaluation import METRICS, format_comparison

    if (
        options.compare is not None
        and Path(options.compare).absolute() == Path(options.model).absolute()
    ):
        raise ConfigError(f"--compare {options.compare} is the model itself. Give another one.")
    raw = read_source(options.data, options.split or "train", local_files_only=not options.download)
    plan = None
    if options.template is not None or options.system is not None:
        plan = plan_formatter(raw, template=options.template, system=options.system)
        plan.check(raw)
    metrics = list(METRICS) if options.metrics is None else split_names(options.metrics)
    results, spec = {}, None
    for name in (options.model, options.compare):
        if name is None:
            continue
        model = load_quantized(name, **read_loading(options))
        formatter = None if plan is None else plan.make(model.tokenizer)
        if formatter is None and spec is not None:
            # Both are asked in the same words.
            formatter = formatter_from_spec(spec, model.tokenizer)
        result = evaluate(
            model, raw, formatter=formatter, metrics=metrics, regex=options.regex,
            answers=options.answers, max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size, limit=options.limit,
        )  # fmt: skip
        results[name] = result
        remembered = model.record.formatter
        spec = None if remembered is None else remembered.template_spec()
        # Two models need not fit beside each other.
        del model, formatter, remembered
    if options.json:
        print_json(
            {
                name: {**to_jsonable(one), "perplexity": one.perplexity, "answers": one.answers}
                for name, one in results.items()
            }
        )
    elif len(results) == 1:
        print(*results.values())
    else:
        short = {_shorten_path(name): one for name, one in results.items()}
        print(format_comparison(short if len(short) == len(results) else results))


def _shorten_path(name: str) -> str:
    return "/".join(name.rstrip("/").split("/")[-2:])


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


def _doctor(options: argparse.Namespace, write: FlagWriter) -> int:
    from qlora_kit.diagnosis import diagnose

    findings = diagnose(network=options.network)
    if options.json:
        print_json(findings)
    else:
        print("\n".join(map(str, findings)))
    return int(any(one.state == "problem" for one in findings))


def _report(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit.report import write_report

    print(write_report(options.output))


def _recipe(options: argparse.Namespace, write: FlagWriter) -> None:
    from qlora_kit.recipe_text import format_recipe
    from qlora_kit.recipes import recipe_from_run, write_recipe

    recipe = recipe_from_run(options.from_run)
    note = f"What trained {options.from_run}; run it with: qlora-kit train THIS_FILE"
    if options.path is None:
        print(format_recipe(recipe, note=note), end="")
    else:
        print(write_recipe(recipe, options.path, note=note))


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
    "plan": _plan,
    "generate": _generate,
    "chat": _chat,
    "export": _export,
    "exporters": _exporters,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "recipe": _recipe,
    "report": _report,
    "templates": _templates,
    "completion": _completion,
}
