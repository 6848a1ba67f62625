"""Whether the installed libraries are ones that this library was run with.

The ranges stand in the package's own metadata; ``pyproject.toml`` says what ran on their ends.
``pip`` keeps to them; environments that were put together otherwise are told of it here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

__all__ = ["find_untested", "warn_of_untested"]

logger = logging.getLogger(__name__)

_DISTRIBUTION = "qlora-kit"


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
