"""For people who write exporters or formatters: the contract as a test, and a tiny model.

    from qlora_kit.testing import check_exporter, check_formatter

    def test_contract():
        check_exporter(MyExporter())
        check_formatter(MyFormatter)

Nothing is downloaded. Importing this package imports none of the heavy libraries.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from qlora_kit.handles import AdaptedModel
from qlora_kit.hookspecs import Exporter
from qlora_kit.private_folders import scratch_folder
from qlora_kit.testing.contract import Contract, hold_to
from qlora_kit.testing.formatter_promises import FORMATTER_PROMISES, FormatterContract
from qlora_kit.testing.promises import PROMISES
from qlora_kit.testing.tiny_model import make_tiny_model, make_tiny_tokenizer

__all__ = ["ContractError", "check_exporter", "check_formatter", "make_tiny_model"]


class ContractError(AssertionError):
    """An exporter or a formatter breaks promises that the stages and users rely on.

    Attributes:
        broken: For each broken promise, its sentence and what was seen instead.
    """

    def __init__(
        self, under_test: object, broken: Mapping[str, str], checked: int, noun: str = "Exporter"
    ) -> None:
        self.broken = dict(broken)
        kind = under_test if isinstance(under_test, type) else type(under_test)
        name = getattr(under_test, "name", None)
        lines = [
            f"{noun} {name!r} ({kind.__module__}.{kind.__qualname__}) breaks {len(broken)} of "
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
    with _scratch_folder() as folder:
        if model is None:
            model = make_tiny_model(folder / "base")
        contract = Contract(exporter, dict(options or {}), model, folder, verify, is_deterministic)
        checked, broken = hold_to(contract, PROMISES)
    if broken:
        raise ContractError(exporter, broken, len(checked))
    return tuple(checked)


def check_formatter(
    kind: type,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> tuple[str, ...]:
    """Hold a class of formatters to the contract of formatters; takes a moment, without a model.

    Encodes rows, rebuilds the formatter from its spec as an export's manifest keeps it, and asks
    for a prompt.

    Args:
        kind: The class; it need not be registered.
        rows: Rows as data sets have them, at least two different ones. By default two rows with
            a sentence for every role.
        options: Arguments of the class to make it with.
        prompt: Arguments of ``prompt()`` that ask for the answer of the first row; by default the
            row's roles that are not learned.
        tokenizer: A tokenizer in place of a tiny one in ChatML.

    Returns:
        The promises that were checked, one sentence each.

    Raises:
        ContractError: Lists every promise that was broken, and what was seen.
    """
    if rows is None:
        rows = [_make_row(kind, number) for number in (1, 2)]
    contract = FormatterContract(
        kind, rows, dict(options or {}), prompt, tokenizer or make_tiny_tokenizer()
    )
    checked, broken = hold_to(contract, FORMATTER_PROMISES)
    if broken:
        raise ContractError(kind, broken, len(checked), "Formatter")
    return tuple(checked)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder that is also the working directory and holds the temporary files."""
    before, temporary = Path.cwd(), tempfile.tempdir
    with scratch_folder("contract") as made:
        # What the system calls it, so that paths compare equal (macOS links /var).
        folder = made.resolve()
        for part in ("cwd", "tmp"):
            (folder / part).mkdir()
        os.chdir(folder / "cwd")
        tempfile.tempdir = str(folder / "tmp")
        try:
            yield folder
        finally:
            os.chdir(before)
            tempfile.tempdir = temporary


def _make_row(kind: Any, number: int) -> dict[str, str]:
    """A sentence for every role that must be filled; optional ones may hold lists or numbers."""
    roles = getattr(kind, "roles", ())
    return {role: f"The {role} of row {number} is a sentence." for role in roles}
