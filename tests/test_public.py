"""The public face: names, light imports, the same list everywhere."""

import subprocess
import sys

import pytest

import qlora_kit

HEAVY = (
    "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "unsloth", "accelerate",
    "numpy", "safetensors", "tokenizers", "huggingface_hub",
)  # fmt: skip


def _fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_heavy_library():
    loaded = _fresh(
        "import sys, qlora_kit; dir(qlora_kit)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize(
    "module",
    ["config", "results", "handles", "errors", "hookspecs", "plugins", "loading", "adapters",
     "data", "export", "verification.checkpoint", "artifacts.staging", "generation", "training",
     "cli", "manifest", "device", "options", "testing"],
)  # fmt: skip
def test_every_module_imports_alone_and_lightly(module):
    loaded = _fresh(
        f"import sys, qlora_kit.{module}\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_public_names_are_sorted_and_resolve():
    assert qlora_kit.__all__ == sorted(qlora_kit.__all__)
    assert len(set(qlora_kit.__all__)) == len(qlora_kit.__all__)
    for name in qlora_kit.__all__:
        assert getattr(qlora_kit, name) is not None, name
    assert dir(qlora_kit) == qlora_kit.__all__


def test_public_names_match_their_type_checking_mirror():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(qlora_kit.__file__).read_text(encoding="utf-8"))
    guarded = next(
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)
    )
    names = {
        alias.name
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {node.target.id for node in guarded.body if isinstance(node, ast.AnnAssign)}
    assert names == set(qlora_kit.__all__)


def test_public_callables_have_docstrings_with_errors():
    import inspect

    for name in qlora_kit.__all__:
        value = getattr(qlora_kit, name)
        if inspect.isfunction(value):
            assert value.__doc__, name
            assert "Args:" in value.__doc__ or not inspect.signature(value).parameters, name


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_quantised'"):
        qlora_kit.load_quantised  # noqa: B018
