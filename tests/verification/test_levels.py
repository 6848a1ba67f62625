"""What ``verify=True`` and ``verify="full"`` mean for every format that compares in two steps."""

from __future__ import annotations

import pytest

from qlora_kit.errors import ExportError
from qlora_kit.results import Check
from qlora_kit.verification.levels import compare_by_level

SOUND = Check("files", True, "all there")
WRONG = Check("files", False, "one is missing")


def run_it():
    return [Check("run", True, "says the same")], {"kl": 0.5}


@pytest.mark.parametrize(
    ("verify", "is_cheap", "names"),
    [
        (True, False, ["files"]),
        (True, True, ["files", "run"]),
        ("full", False, ["files", "run"]),
    ],
)
def test_the_costly_step_runs_when_it_was_asked_for_or_is_cheap(verify, is_cheap, names):
    found = compare_by_level(verify, lambda: [SOUND], run_it, is_cheap=lambda: is_cheap)
    assert [check.name for check in found.checks] == names
    assert found.level == ("full" if verify == "full" else "standard")
    assert found.facts == ({"kl": 0.5} if "run" in names else {})


def test_files_that_are_wrong_are_never_run():
    found = compare_by_level("full", lambda: [SOUND, WRONG], run_it, is_cheap=lambda: True)
    assert found.checks == (SOUND, WRONG)
    assert not found.passed


@pytest.mark.parametrize("error", [ExportError("it is truncated"), OSError("no such file")])
def test_files_that_cannot_be_read_are_a_failed_comparison(error):
    def read():
        raise error

    found = compare_by_level("full", read, run_it)
    assert [check.passed for check in found.checks] == [False]
    assert str(error) in found.checks[0].detail


def test_mistakes_of_our_own_are_not_taken_for_damaged_files():
    with pytest.raises(ZeroDivisionError):
        compare_by_level(True, lambda: [Check("files", 1 / 0 > 0, "")], run_it)
