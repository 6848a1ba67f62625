"""For people who write exporters: the contract as a test, and a tiny model to run it on.

    from qlora_kit.testing import check_exporter

    def test_contract():
        check_exporter(MyExporter())

Nothing is downloaded. Importing this package imports none of the heavy libraries.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from qlora_kit.handles import AdaptedModel
from qlora_kit.hookspecs import Exporter
from qlora_kit.testing.contract import Broken, Contract
from qlora_kit.testing.promises import PROMISES
from qlora_kit.testing.tiny_model import make_tiny_model

__all__ = ["ContractError", "check_exporter", "make_tiny_model"]


class ContractError(AssertionError):
    """An exporter breaks promises that the stage and users rely on.

    Attributes:
        broken: For each broken promise, its sentence and what was seen instead.
    """

    def __init__(self, exporter: object, broken: Mapping[str, str], checked: int) -> None:
        self.broken = dict(broken)
        kind = type(exporter)
        name = getattr(exporter, "name", None)
        lines = [
            f"Exporter {name!r} ({kind.__module__}.{kind.__qualname__}) breaks {len(broken)} of "
            f"the {checked} promises checked:"
        ]
        for number, (promise, seen) in enumerate(self.broken.items(), 1):
            lines += [f"  {number}. {promise}", *(f"     {line}" for line in seen.splitlines())]
        super().__init__("\n".join(lines))


def check_exporter(
    exporter: Exporter,
    *,
    options: Mapping[str, Any] | None = None,
    model: AdaptedModel | None = None,
    verify: Literal[True, "full"] = True,
    is_deterministic: bool = True,
) -> tuple[str, ...]:
    """Hold an exporter to the contract of export formats; takes seconds on a CPU.

    Exports a tiny random model several times, in a folder that is removed afterwards, and
    then damages what was written to see whether ``verify`` notices. For a format that leaves
    nothing on this disk (``needs_path = False``), the promises about files are skipped.

    Args:
        exporter: An instance; it need not be registered.
        options: The format's options to use; needed where some have no default. A value for a
            secret (a field with ``repr=False``) is looked for wherever it must not appear.
        model: The adapted model to export; by default :func:`make_tiny_model`'s, 4-bit. Its
            adapter is changed during the test and put back.
        verify: The level of verification that has to notice damage.
        is_deterministic: Whether one model gives the same bytes every time.

    Returns:
        The promises that were checked, one sentence each.

    Raises:
        ContractError: Lists every promise that was broken, and what was seen.
    """
    checked: list[str] = []
    broken: dict[str, str] = {}
    with _scratch_folder() as folder:
        if model is None:
            model = make_tiny_model(folder / "base")
        contract = Contract(exporter, dict(options or {}), model, folder, verify, is_deterministic)
        for promise in PROMISES:
            if not promise.applies(contract):
                continue
            checked.append(promise.sentence)
            try:
                promise.check(contract)
            except Broken as seen:
                broken[promise.sentence] = str(seen)
            except Exception as error:  # noqa: BLE001 - whatever the exporter raises is a finding
                broken[promise.sentence] = f"It raised {type(error).__name__}: {error}"
            if promise.is_required and promise.sentence in broken:
                break
    if broken:
        raise ContractError(exporter, broken, len(checked))
    return tuple(checked)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder that is also the working directory and holds the temporary files."""
    before, temporary = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="qlora_kit-contract-") as name:
        # What the system calls it, so that paths compare equal (macOS links /var).
        folder = Path(name).resolve()
        for part in ("cwd", "tmp"):
            (folder / part).mkdir()
        os.chdir(folder / "cwd")
        tempfile.tempdir = str(folder / "tmp")
        try:
            yield folder
        finally:
            os.chdir(before)
            tempfile.tempdir = temporary
