"""How far a verification goes: the files first, then whatever costs a reload or a run.

Every format that compares in two steps goes through here, so that ``verify=True`` and
``verify="full"`` mean the same everywhere and nothing costly runs on files that are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from qlora_kit.errors import QloraKitError
from qlora_kit.results import Check, Verification

__all__ = ["compare_by_level"]


def compare_by_level(
    verify: bool | Literal["full"],
    compare_files: Callable[[], Sequence[Check]],
    run: Callable[[], tuple[Sequence[Check], dict[str, Any]]],
    *,
    is_cheap: Callable[[], bool] = lambda: False,
) -> Verification:
    """Compare the files, and then the model that they make, as far as was asked for.

    Args:
        verify: ``True`` or ``"full"``.
        compare_files: Reads the files back. What it cannot read at all it raises, which counts
            as a failed comparison.
        run: Loads and runs what was written; returns comparisons and facts. Called only when
            every comparison of the files held, and ``verify`` is ``"full"`` or it is cheap.
        is_cheap: Whether ``run`` costs so little that it is always done.
    """
    level: Literal["standard", "full"] = "full" if verify == "full" else "standard"
    try:
        checks = list(compare_files())
    except (QloraKitError, OSError) as error:
        return Verification(level, (Check("files", False, str(error)),))
    facts: dict[str, Any] = {}
    if all(check.passed for check in checks) and (level == "full" or is_cheap()):
        more, facts = run()
        checks += more
    return Verification(level, tuple(checks), facts)
