"""Keyword arguments into typed options, and what is said about wrong ones."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from qlora_kit.errors import ConfigError, UnknownOptionError
from qlora_kit.options import COLLECTS_UNKNOWN, build_options, describe_option_fields


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Options:
    names: Sequence[str] = ()
    count: int | None = None
    rate: float = 0.5
    mode: Literal["fast", "small", 1] = "fast"
    folder: Path | None = None
    pair: tuple[int, ...] = (1, 2)
    extra: dict[str, Any] = field(default_factory=dict)
    anything: Any = None
    color: Color = Color.RED
    flag: bool = False
    raw: list | None = None
    derived: int = field(default=7, init=False)


def build(**given):
    return build_options(Options, given, owner="fmt")


@pytest.mark.parametrize(
    "given",
    [
        {"names": ["a"]}, {"names": ("a", "b")}, {"count": 3}, {"count": None}, {"rate": 1},
        {"mode": 1}, {"folder": Path("x")}, {"pair": (1, 2, 3)}, {"extra": {"a": 1}},
        {"anything": object}, {"color": Color.RED}, {"flag": True}, {"raw": [1, "a"]},
    ],
)  # fmt: skip
def test_values_that_fit_are_taken(given):
    ((name, value),) = given.items()
    assert getattr(build(**given), name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": "abc"}, r"names must be Sequence\[str\], got 'abc'"),
        ({"names": [1]}, r"names must be Sequence\[str\], got \[1\]"),
        ({"count": True}, r"count must be int or None, got True"),
        ({"count": "3"}, r"count must be int or None, got '3'"),
        ({"rate": "x"}, r"rate must be float, got 'x'"),
        ({"mode": "slow"}, r"mode must be 'fast' or 'small' or 1, got 'slow'"),
        ({"mode": True}, r"mode must be"),
        ({"folder": 3}, r"folder must be Path or None, got 3"),
        ({"pair": ["a"]}, r"pair must be tuple"),
        ({"extra": [1]}, r"extra must be dict\[str, Any\], got \[1\]"),
        ({"color": "red"}, r"color must be Color, got 'red'"),
        ({"flag": 1}, r"flag must be bool, got 1"),
        ({"raw": "abc"}, r"raw must be list or None, got 'abc'"),
    ],
)
def test_values_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ConfigError, match=f"Format 'fmt': {message}"):
        build(**given)


def test_text_becomes_a_path_and_a_list_a_tuple():
    built = build(folder="some/where", pair=[3, 4])
    assert built.folder == Path("some/where")
    assert built.pair == (3, 4)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnknownOptionError, match=r"no option 'cuont'\. Did you mean 'count'\?"):
        build(cuont=3)
    with pytest.raises(UnknownOptionError, match="Its options: names, count") as caught:
        build(derived=3)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


def test_required_options_and_the_collector_of_unknown_ones():
    @dataclass(frozen=True)
    class Collecting:
        repo: str
        rest: dict[str, Any] = field(default_factory=dict, metadata={COLLECTS_UNKNOWN: True})

    with pytest.raises(ConfigError, match=r"Format 'hub' needs repo=\.\.\.\."):
        build_options(Collecting, {"x": 1}, owner="hub")
    assert build_options(Collecting, {"repo": "a", "x": 1}, owner="hub").rest == {"x": 1}
    (repo,) = describe_option_fields(Collecting)
    assert (repo.name, repo.is_required, repo.default) == ("repo", True, None)


@dataclass(frozen=True)
class Secretive:
    token: str | None = field(default=None, repr=False)
    other: str | None = field(default="from the environment", repr=False)


def test_secrets_are_not_shown():
    with pytest.raises(ConfigError, match="token must be str or None, got a bytes") as caught:
        build_options(Secretive, {"token": b"s3cr3t"}, owner="hub")
    assert "s3cr3t" not in str(caught.value)
    token, other = describe_option_fields(Secretive)
    assert (token.default, token.is_secret) == (None, True)
    assert (other.default, other.is_secret) == ("...", True)


def test_a_stranger_s_checks_become_config_errors():
    @dataclass(frozen=True)
    class Checking:
        level: int = 1
        scale: InitVar[int] = 1

        def __post_init__(self, scale):
            if self.level > 9:
                raise ValueError("level goes to 9")

    with pytest.raises(ConfigError, match="Format 'fmt': level goes to 9"):
        build_options(Checking, {"level": 10}, owner="fmt")


def test_annotations_that_cannot_be_read_are_not_checked():
    @dataclass
    class Odd:
        value: "OnlyForTypeCheckers" = None  # noqa: F821

    assert build_options(Odd, {"value": 3}, owner="fmt").value == 3
    assert describe_option_fields(Odd)[0].type == "OnlyForTypeCheckers"


def test_options_are_described_as_people_write_them():
    described = {
        option.name: (option.type, option.default) for option in describe_option_fields(Options)
    }
    assert described["names"] == ("Sequence[str]", ())
    assert described["count"] == ("int or None", None)
    assert described["mode"] == ("'fast' or 'small' or 1", "fast")
    assert described["extra"] == ("dict[str, Any]", {})
    assert "derived" not in described
