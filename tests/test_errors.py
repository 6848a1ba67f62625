"""The exception tree is what its docstring draws."""

import builtins
import re

from qlora_kit import errors


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
