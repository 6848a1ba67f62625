"""From the flags of a command to the sections of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_kit.cli.arguments import read_arguments
from qlora_kit.cli.lists import takes_export_list, takes_training_list
from qlora_kit.cli.values import read_columns, read_list, read_settings, read_value, split_names
from qlora_kit.errors import ConfigError

__all__ = ["read_loading", "read_training"]

#: Fields of a training that have arguments of their own under other names.
_TAKEN = (
    "train_dataset", "formatter", "output_dir", "eval_dataset", "resume_from_checkpoint",
)  # fmt: skip


def read_loading(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``load_quantized`` that were given."""
    return _drop_unset(
        {
            "max_seq_length": options.max_seq_length,
            "dtype": options.dtype,
            "load_in_4bit": False if options.no_4bit else None,
            "load_in_8bit": options.load_in_8bit or None,
            "engine": options.engine,
            "local_files_only": False if options.download else None,
            **read_arguments(options, "model"),
        }
    )


def read_training(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was given to ``train``, as a recipe has it.

    Raises:
        ConfigError: When a value cannot be read, or something was given twice.
    """
    loading = read_loading(options)
    if loading.get("load_in_8bit"):
        # A recipe may have said 4 bits.
        loading["load_in_4bit"] = False
    elif loading.get("load_in_4bit") is False:
        loading["load_in_8bit"] = False
    formats = None if options.export is None else split_names(options.export)
    recipe = {
        "model": loading,
        "adapter": read_arguments(options, "adapter"),
        "data": _drop_unset(
            {
                "split": options.split,
                "eval": options.eval_data,
                "eval_split": options.eval_split,
                "eval_fraction": options.eval_fraction,
                "template": options.template,
                "columns": read_columns(options.columns),
                "system": options.system,
                "response_only": options.response_only,
                "eos_token": options.eos_token,
                "on_bad_rows": options.on_bad_rows,
            }
        ),
        "training": _drop_unset(
            {
                **read_arguments(options, "training"),
                "output_dir": options.output,
                "resume_from_checkpoint": options.resume or None,
            }
        ),
        "export": {
            **read_settings(
                options.export_option, "overwrite", "path", "progress", "formats",
                flag="--export-option", takes_list=takes_export_list,
            ),
            **_drop_unset(
                {
                    "formats": formats,
                    "path": options.export_to,
                    "overwrite": options.overwrite or None,
                }
            ),
        },
    }  # fmt: skip
    _add_settings(recipe, options.settings)
    return recipe


def _add_settings(recipe: dict[str, dict[str, Any]], pairs: list[str]) -> None:
    """Add what ``--set`` gave: training settings, and others with their section."""
    plain = [pair for pair in pairs if "." not in pair.partition("=")[0]]
    given = {
        ("training", name): value
        for name, value in read_settings(plain, *_TAKEN, takes_list=takes_training_list).items()
    }
    for pair in pairs:
        if pair in plain:
            continue
        place, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, got {pair!r}.")
        section, _, name = place.strip().partition(".")
        table, dot, option = name.partition(".")
        value = read_value(text) if section == "training" else read_list(text)
        if dot:
            inner = {**recipe.get(section, {}).get(table, {}), option: value}
            recipe.setdefault(section, {})[table] = inner
        else:
            given[section, name.replace("-", "_")] = value
    for (section, name), value in given.items():
        own = recipe.setdefault(section, {})
        if name in own:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{name} was given twice, by {flag} and by --set. Give one of the two."
            )
        own[name] = value


def _drop_unset(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
