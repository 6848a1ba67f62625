"""Keeping drafts of model cards out of a run's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["NoDraftCards"]


class NoDraftCards:
    """Mixin for TRL's trainers: no ``README.md`` from a template that knows nothing of the run.

    TRL's says "a fine-tuned version of None" for a base on disk, with code that loads "None", and
    peft's is "[More Information Needed]" throughout. The run's manifest says what a run was, and
    exports carry a card of their own.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a checkpoint without the card that peft puts into it."""
        folder = output_dir or self.args.output_dir  # type: ignore[attr-defined]
        card = Path(folder) / "README.md"
        had_card = card.exists()
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if not had_card:
            card.unlink(missing_ok=True)
