"""Recipes as files: TOML and YAML, with paths that are relative to the file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qlora_kit.errors import ConfigError
from qlora_kit.paths import describe_nearest, expand_path
from qlora_kit.recipe_text import format_recipe

__all__ = ["SUFFIXES", "is_recipe", "read_recipe", "write_recipe"]

SUFFIXES: Final = (".toml", ".yaml", ".yml")

#: What hub names do not end with.
_FILES: Final = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".gguf", ".jinja")

#: Keys that hold paths which a run writes to, by section.
_WRITTEN: Final = {"training": ("output_dir",), "export": ("path",)}
#: Keys that hold a path, or a name of something else.
_READ: Final = {
    "model": ("name", "cache_dir"),
    "data": ("train", "eval", "template"),
    "training": ("resume_from_checkpoint",),
}


def is_recipe(name: object) -> bool:
    """Whether a name is that of a recipe's file."""
    return isinstance(name, str | os.PathLike) and Path(name).suffix.lower() in SUFFIXES


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections of a recipe's file, with paths that hold from any folder.

    Args:
        path: A ``.toml``, ``.yaml`` or ``.yml`` file.

    Raises:
        ConfigError: When there is no such file, or it cannot be read as what it is.
    """
    file = expand_path(path)
    if not is_recipe(file):
        raise ConfigError(f"A recipe is a {', '.join(SUFFIXES)} file, got {file}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no recipe {file}.{describe_nearest(file)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"The recipe {file} cannot be read: {error}") from error
    try:
        content = tomllib.loads(text) if file.suffix == ".toml" else _load_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The recipe {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The recipe {file} holds no sections.")
    return {
        str(name): _anchor(str(name), value, file.parent.absolute())
        for name, value in content.items()
    }


def _load_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Numbers as people write them, and no key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str):
                    raise ValueError(f"{name!r} is no name{key.start_mark}")
                if name in seen:
                    raise ValueError(f"{name!r} is there twice{key.start_mark}")
                seen.add(name)
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    # YAML 1.1 reads 2e-4 as text, for want of a point.
    number = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)  # noqa: S506  # derived from the safe one
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _anchor(section: str, content: Any, folder: Path) -> Any:
    """A section with its paths below the recipe's folder."""
    if not isinstance(content, dict):
        is_name = section in ("model", "data")
        return _place(content, folder) if is_name else content
    anchored = dict(content)
    for name in _READ.get(section, ()):
        if name in anchored:
            anchored[name] = _place(anchored[name], folder)
    for name in _WRITTEN.get(section, ()):
        if isinstance(anchored.get(name), str):
            anchored[name] = str(folder / expand_path(anchored[name]))
    return anchored


def _place(value: Any, folder: Path) -> Any:
    """A path below the folder where that is what it names; other names as they are."""
    if isinstance(value, list):
        return [_place(one, folder) for one in value]
    if isinstance(value, Mapping):
        return {**value, "path": _place(value["path"], folder)} if "path" in value else value
    if not isinstance(value, str) or "\n" in value or len(value) > 1000:
        return value
    path = folder / os.path.expanduser(value)  # noqa: PTH111 - names of nobody stay
    # A file that is missing is missed where the recipe says it is.
    is_file = Path(value).suffix.lower() in _FILES or bool(set("*?[") & set(value))
    is_path = is_file or os.path.exists(path) or value.startswith((".", "~"))  # noqa: PTH110
    return str(path) if is_path else value


def write_recipe(
    recipe: Mapping[str, Any], path: str | os.PathLike[str], *, note: str = ""
) -> Path:
    """Write a recipe as TOML.

    Args:
        recipe: Sections and their settings.
        path: The file, which must not exist.
        note: Lines of comment at its top.

    Raises:
        ConfigError: When the file exists or cannot be written.
    """
    file = expand_path(path)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(format_recipe(recipe, note=note))
    except FileExistsError as error:
        raise ConfigError(f"{file} exists already. Give another name.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    return file
