"""Does a test fail when the code is wrong? Small mistakes, one at a time, and who notices.

    python tests/helpers/mutants.py masks            # a sample of 40
    python tests/helpers/mutants.py staging --count 0 --seed 1    # all of them

Each mistake is made in a forked process by giving functions another code object, so that libraries
are imported once. Only test files that call the function are run, quick ones first. What tests do
in processes of their own notices nothing here. Prints what no test noticed, and the share.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

#: What carries the promise: modules, and the tests that should notice.
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "masks": (
        ("data.tokens.segment_ids", "data.tokens.truncation", "data.batches.packing",
         "data.formatters.chat"),
        ("tests/data",),
    ),
    "merge": (
        ("weights.merged", "weights.lora_updates"),
        ("tests/weights", "tests/exporters/test_merged_16bit.py"),
    ),
    "staging": (
        ("artifacts.staging", "private_folders", "file_locks"),
        ("tests/test_private_folders.py", "tests/test_export_destination.py"),
    ),
    "verification": (
        ("verification.levels", "verification.checks", "verification.checkpoint"),
        ("tests/verification", "tests/exporters/test_merged_16bit.py",
         "tests/exporters/test_lora.py"),
    ),
}  # fmt: skip

_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
             ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}  # fmt: skip


def find_changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """How a node can be wrong: a word for it, and what does it to a copy of the node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        other = _COMPARED[type(node.ops[0])]
        yield (
            f"{type(node.ops[0]).__name__} -> {other.__name__}",
            lambda n: n.ops.__setitem__(0, other()),
        )
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _COMPUTED:
        new = _COMPUTED[type(node.op)]
        yield f"{type(node.op).__name__} -> {new.__name__}", lambda n: setattr(n, "op", new())
    if isinstance(node, ast.BoolOp):
        flipped = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"-> {flipped.__name__}", lambda n: setattr(n, "op", flipped())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        changed = (not node.value) if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} -> {changed}", lambda n: setattr(n, "value", changed)
    if isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call left out", lambda n: setattr(n, "value", ast.Constant(None))


class Mutant(NamedTuple):
    """A mistake: the function that has it, where and what it is, and the module's tree with it."""

    module: types.ModuleType
    function: str
    word: str
    tree: ast.Module


def name_functions(tree: ast.Module) -> dict[int, str]:
    """Of each node within a function, by the node's id: the innermost function's qualified name."""
    names: dict[int, str] = {}

    def walk(node: ast.AST, prefix: str, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = prefix + child.name
                is_function = isinstance(child, ast.FunctionDef)
                walk(child, f"{name}.<locals>." if is_function else f"{name}.",
                     name if is_function else function)  # fmt: skip
                continue
            if function:
                names[id(child)] = function
            walk(child, prefix, function)

    walk(tree, "", "")
    return names


def list_mutants(module: types.ModuleType) -> list[Mutant]:
    """Every mistake in the module's functions."""
    tree = ast.parse(inspect.getsource(module))
    found = []
    functions = name_functions(tree)
    for place, node in enumerate(ast.walk(tree)):
        if id(node) not in functions:
            continue
        for word, change in find_changes(node):
            mutated = copy.deepcopy(tree)
            change(next(n for i, n in enumerate(ast.walk(mutated)) if i == place))
            where = f"{module.__name__}:{getattr(node, 'lineno', 0)}"
            found.append(
                Mutant(module, functions[id(node)], f"{where} {word}",
                       ast.fix_missing_locations(mutated))
            )  # fmt: skip
    return found


def install(module: types.ModuleType, tree: ast.Module) -> None:
    """Give the module's functions the code of a changed tree, wherever they are held."""
    codes: dict[str, types.CodeType] = {}

    def collect(code: types.CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                codes.setdefault(constant.co_qualname, constant)
                collect(constant)

    collect(compile(tree, module.__file__ or "", "exec"))
    for holder in [module, *(value for value in vars(module).values() if inspect.isclass(value))]:
        for value in list(vars(holder).values()):
            inner = getattr(value, "fget", None) or getattr(value, "__func__", value)
            function = inspect.unwrap(inner) if callable(inner) else inner
            if not isinstance(function, types.FunctionType):
                continue
            code = codes.get(function.__code__.co_qualname)
            same_file = function.__module__ == module.__name__
            if code and same_file and code.co_freevars == function.__code__.co_freevars:
                function.__code__ = code


def fork(act: Callable[[], int], seconds: int) -> int:
    """The exit status of what is done in a forked, silent process; negative where it never ends."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os._exit(act())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survives(mutant: Mutant, files: list[str], seconds: int) -> bool:
    """Whether all tests pass with the mistake; one that never ends is noticed."""

    def act() -> int:
        install(mutant.module, mutant.tree)
        return run_tests(files)

    return fork(act, seconds) == 0


def run_tests(files: list[str]) -> int:
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout=0", *files]))


def find_callers(
    modules: list[types.ModuleType], files: list[str], seconds: int
) -> dict[str, list[str]]:
    """Which test files call a function (``file:qualified name``), quick ones first."""
    sources = {module.__file__ for module in modules}
    taken: dict[str, float] = {}
    callers: dict[str, list[str]] = {}
    for file in files:
        with tempfile.NamedTemporaryFile() as note:

            def act(file: str = file, note: str = note.name) -> int:
                called: set[str] = set()

                def trace(frame: types.FrameType, event: str, argument: object) -> None:
                    if frame.f_code.co_filename in sources:
                        called.add(f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}")

                threading.settrace(trace)
                sys.settrace(trace)
                status = run_tests([file])
                Path(note).write_text(json.dumps(sorted(called)), encoding="utf-8")
                return status

            start = time.monotonic()
            status = fork(act, seconds)
            if status not in (0, 5):  # 5: all of its tests are slow ones
                sys.exit(f"{file} fails without any mistake.")
            taken[file] = time.monotonic() - start
            for function in json.loads(Path(note.name).read_text(encoding="utf-8") or "[]"):
                callers.setdefault(function, []).append(file)
    return {function: sorted(found, key=taken.__getitem__) for function, found in callers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("--count", type=int, default=40, help="how many; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=600, help="for one run of the tests")
    parser.add_argument("--tests", nargs="*", help="instead of the area's")
    options = parser.parse_args()
    os.chdir(ROOT)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    names, tests = AREAS[options.area]
    paths = [Path(test) for test in options.tests or tests]
    found = [sorted(path.rglob("test_*.py")) if path.is_dir() else [path] for path in paths]
    files = [str(file) for files in found for file in files]
    modules = [importlib.import_module(f"qlora_kit.{name}") for name in names]
    mutants = [mutant for module in modules for mutant in list_mutants(module)]
    if options.count:
        mutants = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    callers = find_callers(modules, files, options.seconds)
    survived = []
    for number, mutant in enumerate(mutants, 1):
        called_by = callers.get(f"{mutant.module.__file__}:{mutant.function}", [])
        said = "noticed "
        if not called_by or survives(mutant, called_by, options.seconds):
            survived.append(mutant.word)
            said = "SURVIVED" if called_by else "SURVIVED (never called)"
        print(f"{number}/{len(mutants)} {said} {mutant.word}", flush=True)
    print(f"{len(survived)} of {len(mutants)} survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
