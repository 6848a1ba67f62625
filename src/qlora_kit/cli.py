"""A thin command line over the same functions: train, generate, export, exporters.

Arguments become keyword arguments and results become lines; nothing is decided here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qlora_kit.checkpoint.destination import check_destination
from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.manifest import to_jsonable

__all__ = ["INTERRUPTED", "main", "quiet_dependencies"]

#: The exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED: Final = 130

# Loggers, and what is in the one message of theirs to drop.
_CHATTY: Final = {
    "torch.utils._pytree": "is an Enum subclass and is now natively",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "bitsandbytes.backends.cpu.ops": "kernels-community",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 1 after an error that was explained, or 130 after Ctrl-C.
    """
    parser = _make_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s"
    )
    quiet_dependencies()
    try:
        return int(options.run(options) or 0)
    except QloraKitError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as `| head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def quiet_dependencies() -> None:
    """Drop three messages of other packages that nobody who runs this can act on.

    torch deprecates what torchao does while it is imported, looks for a GPU's compiler before
    compiling for a CPU, and bitsandbytes asks for a package that would download kernels this
    library does not use. Everything else is shown. Only for programs: the library itself leaves
    logging to whoever imports it.
    """
    for name in _CHATTY:
        logging.getLogger(name).addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _CHATTY.values())


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-kit", description="Fine-tune a language model with QLoRA and export it."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a LoRA adapter on Alpaca-style rows")
    _add_model(train)
    train.add_argument("data", help=".json, .jsonl, .csv, .parquet, a folder or a hub name")
    train.add_argument("--output", default="outputs", help="checkpoints and the manifest")
    train.add_argument("--eval-data", default=None, help="held-out rows to evaluate on")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument(
        "--export", default="lora", help="formats to export afterwards, by comma; '' for none"
    )
    train.add_argument("--export-to", default=None, help="default: OUTPUT/FORMAT")
    train.add_argument("--overwrite", action="store_true", help="replace earlier exports")
    train.add_argument("--r", type=int, default=16, help="rank of the adapter")
    train.add_argument("--lora-alpha", type=float, default=16)
    train.add_argument("--response-only", action="store_true", help="loss on the answer alone")
    train.add_argument("--packing", action="store_true", help="several examples in a row")
    _add_json(train)
    _add_settings(train, "any SFTConfig field, for example max_steps=200")
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", help="answer one instruction")
    _add_model(generate)
    generate.add_argument("instruction")
    generate.add_argument("--input", default="", help="the instruction's input")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    _add_json(generate)
    _add_settings(generate, "any GenerationConfig field, for example temperature=0.7")
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="write a model in another format")
    _add_model(export)
    export.add_argument("format", help="one, or several by comma; see `qlora-kit exporters`")
    export.add_argument(
        "path", nargs="?", help="the folder to write; several formats get one each inside it"
    )
    export.add_argument("--overwrite", action="store_true")
    _add_json(export)
    _add_settings(export, "the format's own options")
    export.set_defaults(run=_export)

    exporters = commands.add_parser("exporters", help="list the export formats")
    _add_json(exporters)
    exporters.set_defaults(run=_exporters)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, an adapter's folder, a .gguf file or a hub name")
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--dtype", default=None)
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--no-4bit", action="store_true", help="keep 16-bit weights")
    bits.add_argument("--load-in-8bit", action="store_true", help="8 bits instead of 4")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--download", action="store_true", help="allow downloading the model")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help=what
    )


def _read_settings(pairs: Sequence[str], *taken: str) -> dict[str, Any]:
    """``name=value`` pairs; values are JSON where they parse as such, text otherwise.

    Args:
        pairs: What ``--set`` was given.
        *taken: Names that the command line has arguments of its own for.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, got {pair!r}.")
        if name.replace("-", "_") in taken:
            raise ConfigError(f"--set {pair}: {name} has an argument of its own, see --help.")
        try:
            settings[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            settings[name.replace("-", "_")] = {"True": True, "False": False, "None": None}.get(
                text, text
            )
    return settings


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


def _train(options: argparse.Namespace) -> int:
    from qlora_kit import AdaptedModel, AlpacaFormatter, attach_lora, export_model, train_sft
    from qlora_kit import get_exporter as find_exporter

    settings = _read_settings(
        options.settings, "output_dir", "packing", "eval_dataset", "resume_from_checkpoint"
    )
    formats = _split_names(options.export)
    target = options.export_to or options.output
    for name in formats:
        # A misspelt format or an export in the way is said now, not after an hour.
        find_exporter(name)
        check_destination(Path(target) / name, overwrite=options.overwrite, protected=())
    model = _load(options)
    formatter = AlpacaFormatter(model.tokenizer, response_only=options.response_only)
    rows = formatter.load(options.data)
    held_out = None if options.eval_data is None else formatter.load(options.eval_data)
    if not isinstance(model, AdaptedModel):
        model = attach_lora(model, r=options.r, lora_alpha=options.lora_alpha)
    if options.resume:
        settings["resume_from_checkpoint"] = True
    result = train_sft(
        model,
        rows,
        output_dir=options.output,
        eval_dataset=held_out,
        packing=options.packing,
        **settings,
    )
    if not options.json:
        print(result)
    if result.was_interrupted:
        if options.json:
            _print_json({"training": result, "exports": [], "failures": {}})
        sys.stderr.write(
            f"Stopped, nothing was exported. The same command with --resume goes on from "
            f"{result.checkpoint}.\n"
            if result.checkpoint
            else "Stopped before the first step was done; there is nothing to go on from.\n"
        )
        return INTERRUPTED
    results: Any = {}
    if formats:
        results = export_model(model, formats, target, overwrite=options.overwrite)
    if not options.json:
        return _print_results(results) if formats else 0
    failures = {name: str(error) for name, error in getattr(results, "failures", {}).items()}
    _print_json({"training": result, "exports": list(results.values()), "failures": failures})
    return 1 if failures else 0


def _generate(options: argparse.Namespace) -> None:
    from qlora_kit import AlpacaFormatter, generate_stream

    settings = _read_settings(options.settings, "max_new_tokens")
    model = _load(options)
    formatter = model.record.formatter or AlpacaFormatter(model.tokenizer)
    prompt = formatter.prompt(options.instruction, options.input)
    text, chunk = "", None
    for chunk in generate_stream(model, prompt, max_new_tokens=options.max_new_tokens, **settings):
        text += chunk.text
        if not options.json:
            print(chunk.text, end="", flush=True)
    if not options.json:
        print()
    elif chunk is not None:
        _print_json({**to_jsonable(chunk), "text": text})


def _export(options: argparse.Namespace) -> int:
    from qlora_kit import export_model, get_exporter

    settings = _read_settings(options.settings, "overwrite", "path", "format")
    formats = _split_names(options.format)
    for name in formats:
        get_exporter(name)  # before a model is loaded for nothing
    model = _load(options)
    if len(formats) != 1:
        results = export_model(
            model, formats, options.path, overwrite=options.overwrite, **settings
        )
        if not options.json:
            return _print_results(results)
        failures = {name: str(error) for name, error in results.failures.items()}
        _print_json({"exports": list(results.values()), "failures": failures})
        return 1 if failures else 0
    artifact = export_model(
        model, formats[0], options.path, overwrite=options.overwrite, **settings
    )
    if options.json:
        _print_json({"exports": [artifact], "failures": {}})
    else:
        _print_artifact(artifact)
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(to_jsonable(value), indent=2, ensure_ascii=False))


def _split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_results(results: Any) -> int:
    """Show what was exported and what was not; the exit status."""
    for artifact in results.values():
        _print_artifact(artifact)
    for name, error in results.failures.items():
        sys.stderr.write(f"{name} FAILED: {type(error).__name__}: {error}\n")
    return 1 if results.failures else 0


def _print_artifact(artifact: Any) -> None:
    checked = "checked against the live model" if artifact.verification.checks else "not checked"
    print(
        f"{artifact.format}: {artifact.path or artifact.url}, {len(artifact.files)} files, "
        f"{artifact.size / 1e6:.1f} MB, {checked}"
    )


def _exporters(options: argparse.Namespace) -> None:
    from qlora_kit.export import describe_exporters

    described = describe_exporters()
    if options.json:
        _print_json(described)
        return
    for entry in described["exporters"]:
        state = "; ".join(f"missing: {phrase}" for phrase in entry["missing"]) or "ready"
        print(f"{entry['name']:<16} {entry['summary']}")
        print(f"{'':<16} {entry['distribution']} {entry['version'] or ''}; {state}")
        for option in entry["options"]:
            needed = " (must be given)" if option["default"] is None else ""
            default = "" if needed else f" = {option['default']}"
            secret = " (kept out of manifests)" if option["is_secret"] else ""
            print(f"{'':<16}   {option['name']}: {option['type']}{default}{needed}{secret}")
    for broken in described["broken"]:
        print(f"not usable: {broken}")
    for plugin in described["switched_off"]:
        print(f"switched off: {plugin}")
