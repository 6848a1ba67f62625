"""A run as one page: curves, data, answers, exports and the recipe, readable without a network.

It is drawn from the manifests in an output folder alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from qlora_kit.errors import ConfigError
from qlora_kit.manifest import MANIFEST_NAME, read_manifest
from qlora_kit.recipe_text import format_recipe
from qlora_kit.report.charts import Line, draw_bars, draw_lines
from qlora_kit.report.style import STYLE

__all__ = ["REPORT_NAME", "write_report"]

REPORT_NAME: Final = "report.html"


def write_report(output_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of a run into its output folder.

    Training writes it by itself; written again, it has the exports that were made since.

    Args:
        output_dir: The output folder of a run.

    Returns:
        The page, one file that needs nothing else.

    Raises:
        ConfigError: When the folder holds no run.
    """
    folder = Path(output_dir).expanduser()
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / MANIFEST_NAME} cannot be read: {error}") from error
    if manifest.get("kind") != "training":
        raise ConfigError(f"{folder} holds no {MANIFEST_NAME} of a training.")
    path = folder / REPORT_NAME
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(_make_page(folder, manifest), encoding="utf-8")
    os.replace(partial, path)
    return path


def _make_page(folder: Path, manifest: Mapping[str, Any]) -> str:
    result = manifest.get("result") or {}
    base = (manifest.get("base") or {}).get("name_or_path", "?")
    name = Path(str(base)).name
    sections = [
        ("Loss", _draw_loss(manifest)),
        ("Speed and memory", _draw_machine(manifest)),
        ("Data", _show_data(manifest)),
        ("Before and after", _show_samples(manifest)),
        ("Exports", _show_exports(folder)),
        ("Again", _show_recipe(folder, manifest)),
    ]
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content
    )
    title = escape(f"{name}: {result.get('steps', 0)} steps")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style><main><header><h1>{title}</h1>{_show_summary(manifest)}</header>"
        f"{body}<footer>{escape(_describe_versions(result))}</footer></main></html>\n"
    )


def _show_summary(manifest: Mapping[str, Any]) -> str:
    result, memory = manifest.get("result") or {}, manifest.get("memory") or {}
    losses = [value for value in result.get("losses") or () if isinstance(value, int | float)]
    planned = (memory.get("parts") or {}).get("total_gib")
    tiles = [
        ("loss", f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "–", "first and last step"),
        ("steps", f"{result.get('steps', 0):,}",
         "interrupted" if result.get("was_interrupted") else "all done"),
        ("time", _say_time(result.get("seconds") or 0), str(result.get("device", ""))),
        ("speed", f"{result.get('tokens_per_second') or 0:,.0f}", "tokens a second"),
        ("memory", f"{result.get('peak_memory_gib') or 0:.2f} GiB",
         f"peak; planned {planned:.2f}" if isinstance(planned, int | float) else "peak"),
        ("adapter", f"{result.get('trainable_parameters') or 0:,}",
         f"of {result.get('total_parameters') or 0:,} parameters"),
    ]  # fmt: skip
    return "<dl>" + "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    ) + "</dl>"  # fmt: skip


def _draw_loss(manifest: Mapping[str, Any]) -> str:
    log = manifest.get("logged") or []
    result = manifest.get("result") or {}
    losses = result.get("losses") or []
    first = (result.get("steps") or len(losses)) - len(losses)
    trained = [
        (first + index + 1.0, float(value))
        for index, value in enumerate(losses)
        if isinstance(value, int | float)
    ]
    held_out = [(float(step), float(value)) for step, value in result.get("eval_losses") or ()
                if isinstance(value, int | float)]  # fmt: skip
    rates = [(entry["step"], entry["learning_rate"]) for entry in log if "learning_rate" in entry]
    drawn = draw_lines(
        [Line("training", "one", trained), Line("held-out rows", "two", held_out)],
        "loss per trained token",
    )
    return drawn + draw_lines([Line("learning rate", "three", rates)], "")


def _draw_machine(manifest: Mapping[str, Any]) -> str:
    moments = manifest.get("timeline") or []
    if len(moments) < 2:
        return ""
    speeds = []
    for before, after in itertools.pairwise(moments):
        seconds = after["seconds"] - before["seconds"]
        if seconds > 0 and after["tokens"] is not None:
            speeds.append((after["step"], (after["tokens"] - before["tokens"]) / seconds))
    held = [(moment["step"], moment["memory_gib"]) for moment in moments]
    planned = ((manifest.get("memory") or {}).get("parts") or {}).get("total_gib")
    limit = ("planned peak", planned) if isinstance(planned, int | float) else None
    first = moments[0]["seconds"]
    note = (
        f"<p>The first step took {escape(_say_time(first))}, with whatever was compiled for it. "
        f"Steps: {escape(str((manifest.get('result') or {}).get('plan', '')))}.</p>"
    )
    return (
        draw_lines(
            [Line("speed", "one", speeds)],
            "tokens a second from step to step, with what is evaluated and asked between",
            from_zero=True,
        )
        + draw_lines([Line("memory in use", "two", held)], "GiB", limit=limit, from_zero=True)
        + note
    )


def _show_data(manifest: Mapping[str, Any]) -> str:
    data, looks = manifest.get("data") or {}, manifest.get("looks") or {}
    report = data.get("report") or {}
    tokens, trained = report.get("tokens") or 0, report.get("trained_tokens") or 0
    facts = [
        f"{report.get('examples', 0):,} examples from {data.get('source') or 'memory'}",
        f"{tokens:,} tokens, {trained / tokens:.1%} of them learned" if tokens else "",
        f"longest {report.get('longest', 0):,} tokens, limit {report.get('max_length', 0):,}",
        f"{report.get('truncated', 0):,} cut off, {report.get('dropped', 0):,} left out",
        *map(str, data.get("unused") or ()),
    ]
    lengths = looks.get("lengths") or {}
    bars = draw_bars(lengths.get("counts") or (), lengths.get("width") or 1, "tokens")
    rows = "".join(
        "<pre class=row>" + "".join(
            f"<mark>{escape(piece['text'])}</mark>" if piece["is_trained"]
            else escape(piece["text"])
            for piece in row
        ) + "</pre>"
        for row in looks.get("rows") or ()
    )  # fmt: skip
    said = "".join(f"<li>{escape(fact)}</li>" for fact in facts if fact)
    legend = "<p class=keys><mark>marked text is learned</mark></p>" if rows else ""
    return f"<ul>{said}</ul>{bars}{legend}{rows}"


def _show_samples(manifest: Mapping[str, Any]) -> str:
    samples = manifest.get("samples") or []
    if not samples:
        return ""
    shown = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        answers = "".join(
            f"<tr><th>step {sample['step']}</th><td>{escape(sample['answer']) or '–'}</td></tr>"
            for sample in samples
            if sample["prompt"] == prompt
        )
        shown.append(f"<h3>{escape(prompt)}</h3><table>{answers}</table>")
    return "".join(shown)


def _show_exports(folder: Path) -> str:
    shown = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        try:
            manifest = read_manifest(path)
        except (OSError, ValueError):
            continue
        if manifest.get("kind") != "artifact":
            continue
        files = manifest.get("files") or []
        size = sum(file.get("size", 0) for file in files if isinstance(file, Mapping))
        checks = (manifest.get("verification") or {}).get("checks") or []
        said = "".join(
            f"<li>{'✓' if check.get('passed') else '✗'} {escape(str(check.get('name')))}: "
            f"{escape(str(check.get('detail')))}</li>"
            for check in checks
        )
        shown.append(
            f"<h3>{escape(str(manifest.get('format')))}</h3><p>{escape(path.name)}: {len(files)} "
            f"files, {size / 1e6:,.1f} MB</p><ul>{said or '<li>not checked</li>'}</ul>"
        )
    return "".join(shown)


def _show_recipe(folder: Path, manifest: Mapping[str, Any]) -> str:
    kept = manifest.get("recipe")
    if not isinstance(kept, Mapping):
        return ""
    recipe = {
        name: kept[name] for name in ("model", "adapter", "data", "training") if kept.get(name)
    }
    left_out = "".join(f"<li>{escape(str(one))}</li>" for one in kept.get("left_out") or ())
    said = f"<p>What a recipe cannot say:</p><ul>{left_out}</ul>" if left_out else ""
    command = escape(f"qlora-kit recipe --from-run {folder}")
    return f"<p><code>{command}</code></p>{said}<pre>{escape(format_recipe(recipe))}</pre>"


def _describe_versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in (result.get("versions") or {}).items())


def _say_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
