"""What a run was asked for, kept in its manifest so that it can be asked for again.

The parts are those of a recipe file. What no file can say, such as rows that were in memory, is
named instead.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qlora_kit.config import AdapterConfig
from qlora_kit.errors import QloraKitError
from qlora_kit.handles import AdaptedModel
from qlora_kit.manifest import to_jsonable
from qlora_kit.training.examples import TrainingData

__all__ = ["describe_recipe"]

#: Settings that say where a run goes on from, not what it is.
_OF_THE_CALL: Final = ("resume_from_checkpoint", "resume_with_changes")


def describe_recipe(
    model: AdaptedModel, data: TrainingData, eval_dataset: Any, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe of a run that is about to begin.

    Args:
        model: What is trained.
        data: The rows, as they were read.
        eval_dataset: What was given to evaluate on.
        asked: The arguments of ``train_sft``, as given.

    Returns:
        ``model``, ``adapter``, ``data`` and ``training``, and ``left_out``: what a recipe cannot
        say, one phrase each.
    """
    left_out: list[str] = []
    training: dict[str, Any] = {}
    for name, value in asked.items():
        if name in _OF_THE_CALL or value is None or "token" in name:
            continue
        if callable(value) or name == "callbacks":
            left_out.append(f"{name}, which is Python code")
        else:
            training[name] = _make_plain(value)
    if model.record.training is not None:
        left_out.append("the training that the adapter had in the same program before")
    return {
        "model": _describe_model(model),
        "adapter": _describe_adapter(model),
        "data": _describe_data(model, data, eval_dataset, left_out),
        "training": training,
        "left_out": left_out,
    }


def _describe_model(model: AdaptedModel) -> dict[str, Any]:
    base, config = model.base, model.config
    bits: dict[str, Any] = {"load_in_4bit": False}
    if base.is_prequantized or base.quantization in ("nf4", "fp4"):
        bits = {}
    elif base.quantization == "int8":
        bits = {"load_in_8bit": True}
    said = {
        "name": str(model.record.adapter_path or base.name_or_path),
        # Where the adapter lay may name another base by then, or have named another one already.
        "base": base.name_or_path if model.record.adapter_path else None,
        "max_seq_length": model.max_seq_length,
        "dtype": base.compute_dtype,
        **bits,
        "engine": model.engine.name,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _describe_adapter(model: AdaptedModel) -> dict[str, Any]:
    """The settings of a new adapter that are not the defaults; a saved one trains on as it is."""
    if model.record.adapter_path is not None:
        return {}
    usual = AdapterConfig()
    return {
        field.name: _make_plain(value)
        for field in dataclasses.fields(AdapterConfig)
        if (value := getattr(model.adapter, field.name)) != getattr(usual, field.name)
    }


def _describe_data(
    model: AdaptedModel, data: TrainingData, eval_dataset: Any, left_out: list[str]
) -> dict[str, Any]:
    origin = data.summary.get("origin")
    described: dict[str, Any] = {}
    if origin is None:
        left_out.append("the rows, which were in memory")
    else:
        described["train"] = [_shorten(source) for source in origin["sources"]]
        held_out = origin["held_out"]
        if held_out is not None and held_out["part"] == "train":
            described |= {"eval_fraction": held_out["fraction"], "eval_seed": held_out["seed"]}
        if any(float(source["weight"]) % 1 for source in origin["sources"]):
            described["seed"] = origin["seed"]
    if eval_dataset is not None and "eval_fraction" not in described:
        paths = _find_eval_paths(eval_dataset)
        if paths is None:
            left_out.append("the evaluation rows, which were in memory")
        else:
            described["eval"] = paths
    if data.formatter is not None:
        described |= _describe_formatter(model, data.formatter, data.summary.get("columns") or ())
    return described


def _shorten(source: Mapping[str, Any]) -> Any:
    """A source with what is not as usual; its path alone where nothing is."""
    usual = {"split": "train", "weight": 1.0, "columns": {}}
    kept = {name: value for name, value in source.items() if value not in (None, usual.get(name))}
    return kept["path"] if set(kept) == {"path"} else kept


def _find_eval_paths(rows: Any) -> Any:
    if isinstance(rows, str | os.PathLike):
        path = Path(os.path.expanduser(rows))  # noqa: PTH111 - names of nobody stay
        return str(path.absolute()) if os.path.exists(path) else os.fspath(rows)  # noqa: PTH110
    origin = getattr(rows, "origin", None)
    if origin is None or origin.held_out is not None:
        return None
    return [_shorten(source) for source in origin.describe()["sources"]]


def _describe_formatter(
    model: AdaptedModel, formatter: Any, present: Sequence[str]
) -> dict[str, Any]:
    """The fewest options that make the same formatter; its spec where none do."""
    from qlora_kit.data import FormatterBase, plan_formatter

    spec = formatter.template_spec()
    columns = dict(getattr(formatter, "_named_columns", None) or {})
    bad_rows = getattr(formatter, "on_bad_rows", "raise")
    beside: dict[str, Any] = {"columns": columns} if columns else {}
    if bad_rows != "raise":
        beside["on_bad_rows"] = bad_rows
    said = {name: spec.get(name) for name in ("system", "eos_token")}
    said["response_only"] = spec.get("response_only")
    named = [{}, {"template": spec.get("name")}, {"template": spec.get("kind")}]
    extras: list[dict[str, Any]] = [{}]
    extras += [{name: value} for name, value in said.items() if value is not None]
    extras.append({name: value for name, value in said.items() if value is not None})
    for template in named if isinstance(formatter, FormatterBase) else ():
        for extra in extras:
            options = {**template, **extra}
            try:
                made = plan_formatter(present, columns=columns or None, **options)
                if made.make(model.tokenizer).template_spec() == spec:
                    return {**options, **beside}
            except (QloraKitError, TypeError, ValueError):
                continue
    return {"formatter": to_jsonable(spec), **beside}


def _make_plain(value: Any) -> Any:
    """A value as a file can hold it; what a dataclass leaves at its defaults is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: field.default for field in dataclasses.fields(value)}
        kept = {name: getattr(value, name) for name in fields}
        value = {name: one for name, one in kept.items() if one != fields[name]}
    value = getattr(value, "value", value)
    if isinstance(value, os.PathLike):
        return os.path.abspath(os.path.expanduser(value))  # noqa: PTH111
    return to_jsonable(value)
