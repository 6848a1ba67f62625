"""Results as lines for people, or as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from qlora_kit.cli.flags import FlagWriter
from qlora_kit.manifest import to_jsonable

__all__ = [
    "describe_failures",
    "print_answered",
    "print_artifact",
    "print_exporters",
    "print_json",
    "print_results",
]


def print_json(value: Any) -> None:
    """Anything that :func:`~qlora_kit.manifest.to_jsonable` takes."""
    print(json.dumps(to_jsonable(value), indent=2, ensure_ascii=False))


def describe_failures(results: Any, write: FlagWriter) -> dict[str, str]:
    """What went wrong, by format."""
    return {name: write.describe(error) for name, error in results.failures.items()}


def print_results(results: Any, write: FlagWriter) -> int:
    """Show what was exported and what was not; the exit status."""
    for artifact in results.values():
        print_artifact(artifact)
    for name, text in describe_failures(results, write).items():
        sys.stderr.write(f"{name} FAILED: {type(results.failures[name]).__name__}: {text}\n")
    return 1 if results.failures else 0


def print_answered(done: Mapping[str, Any]) -> None:
    """One line about a file of answers."""
    before = f", {done['found_there']} of them from before" if done["found_there"] else ""
    print(f"{done['output']}: {done['answers']} answers{before}")


def print_artifact(artifact: Any) -> None:
    """One line about one export."""
    checked = "checked against the live model" if artifact.verification.checks else "not checked"
    print(
        f"{artifact.format}: {artifact.path or artifact.url}, {len(artifact.files)} files, "
        f"{artifact.size / 1e6:.1f} MB, {checked}"
    )


def print_exporters(described: Mapping[str, Any]) -> None:
    """What :func:`~qlora_kit.describe_exporters` returned."""
    for entry in described["exporters"]:
        state = "; ".join(f"missing: {phrase}" for phrase in entry["missing"]) or "ready"
        print(f"{entry['name']:<16} {entry['summary']}")
        print(f"{'':<16} {entry['distribution']} {entry['version'] or ''}; {state}")
        for option in entry["options"]:
            needed = " (must be given)" if option["is_required"] else ""
            default = "" if needed else f" = {option['default']!r}"
            secret = " (kept out of manifests)" if option["is_secret"] else ""
            print(f"{'':<16}   {option['name']}: {option['type']}{default}{needed}{secret}")
    for broken in described["broken"]:
        print(f"not usable: {broken}")
    for plugin in described["switched_off"]:
        print(f"switched off: {plugin}")
