"""The exception tree is what its docstring draws."""

import builtins
import importlib
import re

import pytest

from qlora_kit import errors
from qlora_kit.boundaries import is_foreign


def test_the_drawn_tree_is_the_real_one():
    drawn = re.findall(r"[├└]── (\w+) \((\w+)\)", errors.__doc__)
    assert {name for name, _ in drawn} | {"QloraKitError"} == {
        name for name in errors.__all__ if name.endswith("Error")
    }
    for name, builtin in drawn:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.QloraKitError), name
        assert issubclass(kind, getattr(builtins, builtin)), name


def test_did_you_mean_names_the_nearest_or_nothing():
    assert errors.did_you_mean("learning_rat", ["learning_rate", "seed"]).endswith(
        "Did you mean 'learning_rate'?"
    )
    assert errors.did_you_mean("zzz", ["learning_rate"]) == ""
    assert errors.did_you_mean("GGUF", ["gguf", "lora"]) == " Did you mean 'gguf'?"


def test_what_is_installed_elsewhere_is_a_library_too(tmp_path, monkeypatch):
    """Packages of ``pip install --target`` lie in no site-packages; nor do users' modules."""
    installed, own = tmp_path / "installed", tmp_path / "own"
    for folder, name in ((installed, "somebodys_package"), (own, "a_users_module")):
        folder.mkdir()
        (folder / f"{name}.py").write_text("def fail():\n    raise KeyError('x')\n")
        monkeypatch.syspath_prepend(folder)
    (installed / "somebodys_package-1.0.dist-info").mkdir()
    found = {}
    for name in ("somebodys_package", "a_users_module"):
        with pytest.raises(KeyError) as caught:
            importlib.import_module(name).fail()
        # From here on, as where the library calls it.
        caught.value.__traceback__ = caught.value.__traceback__.tb_next
        found[name] = is_foreign(caught.value)
    assert found == {"somebodys_package": True, "a_users_module": False}
