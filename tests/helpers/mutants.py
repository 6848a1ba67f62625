"""Does a test fail when the code is wrong? Small mistakes, one at a time, and who notices.

    python tests/helpers/mutants.py masks            # a sample of 40
    python tests/helpers/mutants.py staging --count 0 --seed 1    # all of them

Each mistake is made in a forked process by giving functions another code object, so that libraries
and tests are imported once. Prints what no test noticed, and the share.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import os
import random
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: What carries the promise: modules, and the tests that should notice.
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "masks": (
        ("data.tokens.segment_ids", "data.tokens.truncation", "data.batches.packing"),
        ("tests/data/test_alpaca.py", "tests/data/test_chat.py", "tests/data/test_encoding.py",
         "tests/data/test_pretokenized.py", "tests/data/test_layout_equality.py"),
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


def list_mutants(module: types.ModuleType) -> list[tuple[str, ast.Module]]:
    """Every mistake in the module's functions: where and what, and the whole tree with it."""
    tree = ast.parse(inspect.getsource(module))
    found = []
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for place, node in enumerate(ast.walk(tree)):
        if id(node) not in inside:
            continue
        for word, change in find_changes(node):
            mutated = copy.deepcopy(tree)
            change(next(n for i, n in enumerate(ast.walk(mutated)) if i == place))
            where = f"{module.__name__}:{getattr(node, 'lineno', 0)}"
            found.append((f"{where} {word}", ast.fix_missing_locations(mutated)))
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


def survives(module: types.ModuleType, tree: ast.Module, tests: list[str], seconds: int) -> bool:
    """Whether all tests pass with the mistake; one that never ends is noticed."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        install(module, tree)
        os._exit(run_tests(tests))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run_tests(tests: list[str]) -> int:
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout=0", *tests]))


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
    chosen = options.tests or [test for test in tests if Path(test).exists()]
    modules = [importlib.import_module(f"qlora_kit.{name}") for name in names]
    mutants = [(module, *mutant) for module in modules for mutant in list_mutants(module)]
    if options.count:
        mutants = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    first = modules[0]
    if not survives(first, ast.parse(inspect.getsource(first)), chosen, options.seconds):
        print("The tests fail without any mistake.")
        return 1
    survived = []
    for number, (module, word, tree) in enumerate(mutants, 1):
        if survives(module, tree, chosen, options.seconds):
            survived.append(word)
            print(f"{number}/{len(mutants)} SURVIVED {word}", flush=True)
        else:
            print(f"{number}/{len(mutants)} noticed  {word}", flush=True)
    print(f"{len(survived)} of {len(mutants)} survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
