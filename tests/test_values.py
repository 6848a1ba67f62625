"""What counts as a number of a kind: neither a bool nor a digit string does."""

import math

import pytest

from qlora_kit.values import is_finite_number, is_number, is_whole_number


@pytest.mark.parametrize("value", [True, False, "1", None, 1.0, [1], 1 + 0j])
def test_what_is_no_whole_number(value):
    assert not is_whole_number(value)


def test_whole_numbers_have_a_smallest():
    assert is_whole_number(-3)
    assert is_whole_number(1, at_least=1)
    assert not is_whole_number(0, at_least=1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, True, "2", None])
def test_what_is_no_finite_number(value):
    assert not is_finite_number(value)


def test_numbers_may_be_infinite_unless_finite_ones_are_asked_for():
    assert is_number(math.inf)
    assert not is_number(False)
    assert is_finite_number(2)
    assert is_finite_number(0.5, at_least=0.5)
    assert not is_finite_number(0.4, at_least=0.5)
