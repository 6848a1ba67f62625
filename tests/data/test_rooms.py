"""Which of data's rooms may know of which, for annotations too, which the linter leaves out."""

import ast
from pathlib import Path

import pytest

import qlora_kit.data

ROOT = Path(qlora_kit.data.__file__).parent
BELOW = {
    "sources": set(),
    "tokens": {"sources"},
    "batches": {"sources", "tokens"},
    "formatters": {"sources", "tokens"},
}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_knows_those_below_it_and_no_other(room: str) -> None:
    known = {
        node.module.split(".")[2]
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_kit.data.")
    }
    assert known - {room} <= BELOW[room]


def test_no_file_of_data_is_in_a_cycle() -> None:
    imports: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        name = ".".join(("qlora_kit", "data", *file.relative_to(ROOT).with_suffix("").parts))
        imports[name] = {
            node.module
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
        }
    while leaves := {name for name, known in imports.items() if not known & set(imports)}:
        imports = {name: known for name, known in imports.items() if name not in leaves}
    assert not imports
