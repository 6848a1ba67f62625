"""Whether the installed libraries are ones that this library was run with.

The ranges stand in the package's own metadata, and the versions that everything is tested with in
``constraints.txt``, which lies beside this file in a wheel.
``pip`` keeps to them; environments that were put together otherwise are told of it here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

__all__ = ["find_untested", "read_tested", "warn_of_untested"]

logger = logging.getLogger(__name__)

_DISTRIBUTION = "qlora-kit"
_CONSTRAINTS = "constraints.txt"


@functools.cache
def read_tested() -> dict[str, str]:
    """The versions that everything is tested with, by distribution; empty where nothing says."""
    beside = Path(__file__).with_name(_CONSTRAINTS)
    # From source, it lies where pip is told of it.
    for path in (beside, Path(__file__).parents[2] / _CONSTRAINTS):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
        return {
            one.name: specifier.version
            for one in pinned
            if one.marker is None or one.marker.evaluate()
            for specifier in one.specifier
        }
    return {}


def find_untested(requirements: Iterable[str], extra: str = "") -> list[str]:
    """What is installed outside a range, one phrase each: ``"torch 1.13.0 (tested: >=2.10)"``.

    Args:
        requirements: As in a package's ``Requires-Dist``.
        extra: The extra whose requirements count as well.
    """
    found = []
    for line in requirements:
        try:
            requirement = Requirement(line)
        # An installer of its own kind may have written anything.
        except InvalidRequirement:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} (tested: {requirement.specifier})")
    return found


@functools.cache
def warn_of_untested(extra: str = "") -> None:
    """Say once which libraries are installed in versions that nothing was tested with."""
    try:
        requirements = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        logger.info("%s runs from source: its libraries' versions are not checked.", _DISTRIBUTION)
        return
    untested = find_untested(requirements, extra)
    if untested:
        logger.warning(
            "Installed outside the versions that %s was tested with: %s. It may fail or compute "
            "something else. To get tested ones: pip install --upgrade %s.",
            _DISTRIBUTION, ", ".join(untested), _DISTRIBUTION,
        )  # fmt: skip
