"""Write ``docs/api.md`` from the docstrings, so that the page says what the code says.

python docs/generate_api.py            # or: make docs
python docs/generate_api.py --check    # say whether the page is up to date
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import docstring_parser

import qlora_kit
from qlora_kit import plugins
from qlora_kit.options import describe_option_fields

PAGE = Path(__file__).with_name("api.md")

INTRODUCTION = """\
# API

<!-- Written by docs/generate_api.py from the docstrings; run `make docs` after changing one. -->

Every name here is imported from `qlora_kit` itself. Importing the package loads none of torch,
transformers, trl, peft, datasets or bitsandbytes; each name is resolved when it is first used.

```python
import qlora_kit
from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized, train_sft
```
"""

#: The page's order: what a script uses from top to bottom, then what comes back, then the edges.
SECTIONS: dict[str, tuple[str, ...]] = {
    "The pipeline": ("load_quantized", "attach_lora", "train_sft", "generate_stream",
                     "generate_batch"),
    "Data": ("AlpacaFormatter", "ChatFormatter", "PromptCompletionFormatter", "FormatterBase",
             "Formatter", "Segment", "formatter_from_spec", "pack_examples"),
    "Exporting": ("export_model", "available_exporters", "describe_exporters", "get_exporter"),
    "What comes back": ("LoadedModel", "AdaptedModel", "TrainResult", "TextChunk", "Answer",
                        "Artifact",
                        "ExportResults", "Verification", "Check"),
    "Writing an exporter": ("Exporter", "ExportRequest", "ExportEstimate", "nest_export",
                            "hookimpl", "hookspec"),
    "Configuration values": ("LoadConfig", "AdapterConfig"),
    "Errors": ("errors", "QloraKitError"),
    "Version": ("__version__",),
}  # fmt: skip

#: What the public names take, give back and hold, under its dotted name; what is public by now
#: is left out, since it stands in a section of its own.
DOTTED = (
    "qlora_kit.data.Rows",
    "qlora_kit.data.AlpacaTemplate",
    "qlora_kit.data.DataReport",
    "qlora_kit.data.EncodingReport",
    "qlora_kit.handles.BaseInfo",
    "qlora_kit.results.ArtifactFile",
    "qlora_kit.engines.native.fast.plan.FastPlan",
    "qlora_kit.testing.check_exporter",
    "qlora_kit.testing.check_formatter",
    "qlora_kit.testing.make_tiny_model",
)

#: Names that are not functions or classes with a docstring of their own.
EXPLAINED = {
    "hookimpl": "Marks a plugin's implementation of the hook `qlora_kit_register_exporters()`, "
    "which returns its exporters, or `qlora_kit_register_formatters()`, which returns classes of "
    "formatters. See [Plugins](plugins.md).",
    "hookspec": "Marks hook specifications, as in `qlora_kit.hookspecs`. Plugins do not need it.",
    "__version__": "The installed version, as text.",
}

#: Methods of formatters that their users call; what they inherit is described once.
FORMATTER_METHODS = ("load", "encode", "prompt", "preview", "describe", "segments", "template_spec")


def main() -> int:
    """Write the page, or compare it; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    page = make_page()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    sys.stderr.write("docs/api.md is out of date: run make docs\n")
    return 1


def make_page() -> str:
    """The whole page."""
    names = list_names()
    parts = [INTRODUCTION]
    for title, members in names.items():
        parts.append(f"## {title}\n")
        parts += [describe(name, getattr(qlora_kit, name)) for name in members]
        if title == "Exporting":
            parts.append(describe_formats())
    parts.append("## Values under their dotted names\n")
    public = [getattr(qlora_kit, name) for name in qlora_kit.__all__]
    for dotted in DOTTED:
        value = resolve(dotted)
        if not any(value is known for known in public):
            parts.append(describe(dotted.rpartition(".")[2], value, dotted))
    return "\n".join(parts).rstrip() + "\n"


def list_names() -> dict[str, list[str]]:
    """The public names by section; those that no section names come last."""
    public = set(qlora_kit.__all__)
    sections = {
        title: [name for name in names if name in public] for title, names in SECTIONS.items()
    }
    rest = sorted(public - {name for names in sections.values() for name in names})
    if rest:
        sections["Others"] = rest
    return sections


def resolve(dotted: str) -> Any:
    """What a dotted name stands for."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def describe(name: str, value: Any, heading: str | None = None) -> str:
    """One name: its heading, signature and docstring."""
    heading = f"### `{heading or name}`\n"
    if name in EXPLAINED:
        return f"{heading}\n{EXPLAINED[name]}\n"
    if inspect.ismodule(value):
        return f"{heading}\n{describe_tree(value)}"
    if inspect.isclass(value):
        return f"{heading}\n{describe_class(value)}"
    return f"{heading}\n{describe_callable(name, value)}"


def describe_callable(name: str, value: Any) -> str:
    """Signature, promise, parameters, result and errors of a function or method."""
    return f"{fence(format_signature(name, value))}\n{describe_docstring(value, value)}"


def describe_class(cls: type) -> str:
    """A class: how it is made, its fields or parameters, its methods."""
    parts = []
    is_protocol = getattr(cls, "_is_protocol", False)
    is_error = issubclass(cls, Exception)
    made_by_people = not is_protocol and not is_error and "Args:" in (cls.__doc__ or "")
    if made_by_people:
        parts.append(fence(format_signature(cls.__name__, cls)))
    parts.append(describe_docstring(cls, cls))
    names = FORMATTER_METHODS if made_by_people else own_methods(cls)
    inherited = [f"`{name}`" for name in names if name not in vars(cls)]
    for name in (name for name in names if name in vars(cls)):
        member = vars(cls)[name]
        function = member.fget if isinstance(member, property) else member
        doc = inspect.getdoc(function)
        if not doc:
            continue
        label = f"{cls.__name__}.{name}"
        parts.append(f"#### `{label}`\n")
        if not isinstance(member, property):
            parts.append(fence(format_signature(name, function)))
        parts.append(describe_docstring(function, function))
    if inherited:
        parts.append(
            f"Described under [`FormatterBase`](#formatterbase): {', '.join(inherited)}.\n"
        )
    return "\n".join(parts)


def own_methods(cls: type) -> list[str]:
    """Public methods and properties that the class defines itself, in its order."""
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return [
        name
        for name, member in vars(cls).items()
        if not name.startswith("_")
        and name not in fields
        and (inspect.isfunction(member) or isinstance(member, property))
    ]


def describe_tree(module: Any) -> str:
    """A module whose docstring draws what is in it."""
    text = inspect.getdoc(module) or ""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("    "):
            blocks.append("```text\n" + inspect.cleandoc(block) + "\n```")
        else:
            blocks.append(to_markdown(block))
    return "\n\n".join(blocks) + "\n"


def describe_formats() -> str:
    """The built-in formats with their options."""
    parts = ["### Built-in formats\n"]
    for exporter, module in sorted(list_builtins(), key=lambda pair: pair[0].name):
        del module
        parts.append(f"#### Format `{exporter.name}`\n\n{exporter.summary}\n")
        options = describe_option_fields(exporter.options_type)
        if not options:
            parts.append("No options.\n")
            continue
        meanings = {
            p.arg_name: p.description or ""
            for p in docstring_parser.parse(inspect.getdoc(exporter.options_type) or "").params
        }
        rows = [
            (
                f"`{option.name}`",
                f"`{option.type}`",
                "required" if option.is_required else f"`{option.default!r}`",
                to_markdown(meanings.get(option.name, "")),
            )
            for option in options
        ]
        parts.append(format_table(("option", "type", "default", "meaning"), rows))
    return "\n".join(parts)


def list_builtins() -> Iterator[tuple[Any, Any]]:
    """Every built-in exporter with the module it comes from."""
    for dotted in plugins.BUILTINS:
        module = importlib.import_module(dotted)
        for exporter in module.qlora_kit_register_exporters():
            yield exporter, module


def describe_docstring(owner: Any, value: Any) -> str:
    """A Google-style docstring as Markdown."""
    text, epilogue = split_epilogue(inspect.getdoc(owner) or "")
    doc = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    parts = [format_prose(doc.short_description), format_prose(doc.long_description)]
    arguments = [p for p in doc.params if p.args[0] != "attribute"]
    attributes = [p for p in doc.params if p.args[0] == "attribute"]
    if arguments:
        defaults = read_defaults(value)
        rows = [
            (
                f"`{p.arg_name}`",
                defaults.get(p.arg_name.lstrip("*"), ""),
                to_markdown(p.description),
            )
            for p in arguments
        ]
        parts.append(format_table(("parameter", "default", "meaning"), rows).rstrip("\n"))
    if attributes:
        rows = [(f"`{p.arg_name}`", to_markdown(p.description)) for p in attributes]
        parts.append(format_table(("attribute", "meaning"), rows).rstrip("\n"))
    if doc.returns and doc.returns.description:
        word = "Yields" if doc.returns.is_generator else "Returns"
        parts.append(f"**{word}** {format_prose(doc.returns.description)}")
    if doc.raises:
        lines = [f"- `{r.type_name}`: {to_markdown(r.description)}" for r in doc.raises]
        parts.append("**Raises**\n\n" + "\n".join(lines))
    parts.append(format_prose(epilogue))
    return "\n\n".join(part for part in parts if part) + "\n"


def split_epilogue(text: str) -> tuple[str, str]:
    """A docstring and the prose that follows its sections, which the parser would drop."""
    kept: list[str] = []
    epilogue: list[str] = []
    in_section = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises):", line):
            in_section = True
        elif (in_section and line and not line.startswith(" ")) or epilogue:
            epilogue.append(line)
            continue
        kept.append(line)
    return "\n".join(kept), "\n".join(epilogue)


def read_defaults(value: Any) -> dict[str, str]:
    """Defaults of a function's or class's parameters, as Python shows them."""
    return {
        name: f"`{show_default(parameter.default)}`"
        for name, parameter in inspect.signature(value).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def format_signature(name: str, value: Any) -> str:
    """``name(...)`` over as many lines as it takes, without annotations."""
    parameters = [
        p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")
    ]
    shown: list[str] = []
    kinds = [p.kind for p in parameters]
    for place, parameter in enumerate(parameters):
        before = kinds[place - 1] if place else None
        if parameter.kind is parameter.KEYWORD_ONLY and before not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            shown.append("*")
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(
            parameter.kind, ""
        )
        default = (
            "" if parameter.default is parameter.empty else f"={show_default(parameter.default)}"
        )
        shown.append(f"{prefix}{parameter.name}{default}")
        is_last_positional_only = parameter.kind is parameter.POSITIONAL_ONLY and (
            place + 1 == len(parameters) or kinds[place + 1] is not parameter.POSITIONAL_ONLY
        )
        if is_last_positional_only:
            shown.append("/")
    line = f"{name}({', '.join(shown)})"
    if len(line) <= 90:
        return line
    return name + "(\n" + "".join(f"    {part},\n" for part in shown) + ")"


def show_default(default: Any) -> str:
    """A default as it would be typed."""
    if dataclasses.is_dataclass(default) or callable(default):
        return "..."
    return repr(default)


def fence(text: str) -> str:
    """Text as a block that is not run."""
    return f"```text\n{text}\n```\n"


def format_prose(text: str | None) -> str:
    """Paragraphs, with indented blocks kept as they are."""
    if not text:
        return ""
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(
        f"```text\n{inspect.cleandoc(block)}\n```"
        if block.startswith("    ")
        else to_markdown(block, keep_lines=block.lstrip().startswith(("* ", "- ")))
        for block in blocks
    )


def to_markdown(text: str | None, *, keep_lines: bool = False) -> str:
    """A docstring's text, its reStructuredText roles and literals turned into Markdown."""
    text = text or ""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"``\1``", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"::$", ":", text)
    return text if keep_lines else " ".join(text.split())


def format_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        + "\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
