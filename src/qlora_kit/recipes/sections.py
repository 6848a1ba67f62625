"""What a recipe may hold, and the pipeline that it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from qlora_kit.adapters import attach_lora
from qlora_kit.data import DataSource
from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean
from qlora_kit.export import available_exporters
from qlora_kit.loading import load_quantized
from qlora_kit.pipeline import FORMATTER_OPTIONS, Pipeline
from qlora_kit.script_arguments import ADAPTER_ARGUMENTS, LOADING_ARGUMENTS

__all__ = ["SECTIONS", "make_pipeline", "merge_recipes"]

_ROWS: Final = ("train", "split", "eval", "eval_split", "eval_fraction", "eval_seed", "seed")
_EXPORT: Final = ("formats", "path", "overwrite")

#: The parts of a recipe, and what a part is called that stands for its first key alone.
SECTIONS: Final[Mapping[str, str]] = {
    "model": "name", "adapter": "", "data": "train", "training": "", "export": "formats",
}  # fmt: skip


def merge_recipes(recipe: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with some of its settings replaced.

    Args:
        recipe: Sections and their settings.
        over: The same, for what takes the place of the recipe's own.

    Raises:
        ConfigError: When a section is no table.
        UnknownOptionError: When there is no such section.
    """
    merged = {name: dict(content) for name, content in _read_sections(recipe).items()}
    for name, content in _read_sections(over).items():
        merged[name] = {**merged.get(name, {}), **content}
    return merged


def make_pipeline(recipe: Mapping[str, Any]) -> Pipeline:
    """The pipeline that a recipe asks for; its names are checked.

    Args:
        recipe: Sections and their settings, as a recipe's file holds them.

    Raises:
        ConfigError: When something that every training needs is missing.
        UnknownOptionError: For unknown sections and keys, with the nearest names.
    """
    parts = _read_sections(recipe)
    model, data, export = (dict(parts.get(name, {})) for name in ("model", "data", "export"))
    adapter, training = dict(parts.get("adapter", {})), dict(parts.get("training", {}))
    known = list_keys()
    for section, content in (("model", model), ("adapter", adapter), ("data", data)):
        _check_keys(section, content, known)
    if "name" not in model:
        raise ConfigError("The recipe names no model: [model] name = ...", parameter="model")
    if "train" not in data:
        raise ConfigError("The recipe names no data: [data] train = ...", parameter="data")
    exports, options = _read_export(export)
    return Pipeline(
        model=model.pop("name"),
        data=_read_sources(data["train"]),
        split=data.get("split", "train"),
        eval_data=None if data.get("eval") is None else _read_sources(data["eval"]),
        eval_split=data.get("eval_split"),
        eval_fraction=data.get("eval_fraction"),
        eval_seed=data.get("eval_seed"),
        data_seed=data.get("seed", 3407),
        loading=model,
        adapter=adapter,
        formatting={name: value for name, value in data.items() if name not in _ROWS},
        training=training,
        exports=exports,
        export_path=export.get("path"),
        export_options=options,
        overwrite=export.get("overwrite", False),
    )


def list_keys() -> dict[str, tuple[str, ...]]:
    """The keys of the sections whose keys are known without trl."""
    return {
        "model": ("name", *_list_arguments(load_quantized)),
        "adapter": _list_arguments(attach_lora),
        "data": (*_ROWS, *FORMATTER_OPTIONS),
    }


def _list_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind is not one.VAR_KEYWORD)


def _read_sections(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"A recipe is a table of sections, got {type(recipe).__name__}.")
    sections: dict[str, Mapping[str, Any]] = {}
    for name, content in recipe.items():
        if name not in SECTIONS:
            raise UnknownOptionError(
                f"A recipe has no section {name!r}.{_find_home(str(name))} Its sections: "
                f"{', '.join(SECTIONS)}.",
                parameter=str(name),
                value=content,
            )
        is_short = content is not None and not isinstance(content, Mapping) and SECTIONS[name]
        table = {SECTIONS[name]: content} if is_short else content or {}
        if not isinstance(table, Mapping):
            raise ConfigError(f"[{name}] of a recipe is a table, got {content!r}.")
        sections[name] = table
    return sections


def _check_keys(
    section: str, content: Mapping[str, Any], known: Mapping[str, Sequence[str]]
) -> None:
    classic = {"model": LOADING_ARGUMENTS, "adapter": ADAPTER_ARGUMENTS}.get(section, {})
    for name, value in content.items():
        if name in known[section] or name in classic:
            continue
        raise UnknownOptionError(
            f"[{section}] of a recipe has no {name!r}."
            f"{_find_home(str(name)) or did_you_mean(str(name), known[section])} It has: "
            f"{', '.join(known[section])}.",
            parameter=str(name),
            value=value,
        )


def _find_home(name: str) -> str:
    """Where a key belongs that stands in another section, or in none."""
    from qlora_kit.training import check_training

    homes = [section for section, keys in list_keys().items() if name in keys]
    if not homes and name not in SECTIONS:
        asked: dict[str, Any] = {name: None}
        try:
            check_training(**asked)
        except UnknownOptionError:
            return did_you_mean(name, SECTIONS)
        except (ConfigError, TypeError):
            pass
        homes = ["training"]
    return f" It belongs to [{homes[0]}]." if homes else ""


def _read_sources(value: Any) -> Any:
    """One path as it is; tables, and lists of paths and tables, as sources."""
    if isinstance(value, Mapping) or (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(one, str) or (isinstance(one, Mapping) and "path" in one)
                for one in value)
    ):  # fmt: skip
        return [DataSource.read(one) for one in ([value] if isinstance(value, Mapping) else value)]
    return value


def _read_export(
    content: Mapping[str, Any],
) -> tuple[Sequence[str] | Mapping[str, Mapping[str, Any]], dict[str, Any]]:
    """The formats with options of their own, and the options that go to all of them."""
    formats = content.get("formats")
    tables = {
        name: value
        for name, value in content.items()
        if isinstance(value, Mapping) and name not in _EXPORT
    }
    options = {
        name: value for name, value in content.items() if name not in _EXPORT and name not in tables
    }
    if isinstance(formats, str):
        formats = [name.strip() for name in formats.split(",") if name.strip()]
    if formats is None:
        formats = list(tables) or ["lora"]
    if not isinstance(formats, list | tuple):
        raise ConfigError(f"[export] formats is a list of names, got {formats!r}.")
    for name in tables:
        if name not in formats:
            known = available_exporters()
            advice = f" Add {name!r} to it." if name in known else did_you_mean(name, known)
            raise ConfigError(
                f"[export.{name}] has options of a format that formats does not name: "
                f"{', '.join(formats) or 'none'}.{advice}"
            )
    if not tables:
        return list(formats), options
    return {name: tables.get(name, {}) for name in formats}, options
