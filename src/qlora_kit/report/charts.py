"""Line charts and bars as SVG, which a page shows without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Line", "draw_bars", "draw_lines"]

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 14, 14, 30


class Line(NamedTuple):
    """One line of a chart: its name, its class of colour, and its points."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


def draw_lines(
    lines: Sequence[Line],
    unit: str,
    *,
    limit: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """Lines over steps.

    Args:
        lines: Those with fewer than one finite point are left out.
        unit: What the numbers are.
        limit: A level to draw across, with its name.
        from_zero: Whether the scale begins at zero.
    """
    kept = [line._replace(points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return "<p class=none>Nothing was recorded.</p>"
    values = [y for line in kept for _, y in line.points] + ([limit[1]] if limit else [])
    steps = [x for line in kept for x, _ in line.points]
    low, high = min([0.0, *values] if from_zero else values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    first, last = min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        _, down = place(first, value).split(",")
        parts.append(f"<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1={down} y2={down} />")
        parts.append(f"<text x={_LEFT - 6} y={down} dy=4 class=end>{escape(_spell(value))}</text>")
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = first + share * (last - first)
        across, _ = place(value, low).split(",")
        parts.append(
            f"<text x={across} y={_HEIGHT - 8} text-anchor={anchor}>step {value:.0f}</text>"
        )
    if limit is not None:
        _, down = place(first, limit[1]).split(",")
        parts.append(f"<line class=limit x1={_LEFT} x2={_WIDTH - _RIGHT} y1={down} y2={down} />")
    for line in kept:
        path = " ".join(place(x, y) for x, y in line.points)
        parts.append(f'<polyline class={line.kind} points="{path}" />')
        if len(line.points) < 12:
            for x, y in line.points:
                across, down = place(x, y).split(",")
                parts.append(f"<circle class={line.kind} cx={across} cy={down} r=3 />")
    keys = [f"<span class={line.kind}>{escape(line.name)}</span>" for line in kept]
    if limit is not None:
        keys.append(f"<span class=limit>{escape(limit[0])}</span>")
    label = escape(f"{', '.join(line.name for line in kept)}: {unit} over steps")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}">{"".join(parts)}'
        f"</svg><p class=keys>{' '.join(keys)} <i>{escape(unit)}</i></p>"
    )


def draw_bars(counts: Sequence[int], width: int, unit: str) -> str:
    """How often values fall into ranges of one width."""
    if not counts or not any(counts):
        return "<p class=none>Nothing was recorded.</p>"
    most = max(counts)
    each = (_WIDTH - _LEFT - _RIGHT) / len(counts)
    bars = []
    for index, count in enumerate(counts):
        height = count / most * 120
        title = f"{index * width:,} to {(index + 1) * width - 1:,} {unit}: {count:,} rows"
        bars.append(
            f"<rect x={_LEFT + index * each:.1f} y={130 - height:.1f} width={max(1, each - 2):.1f} "
            f"height={height:.1f}><title>{escape(title)}</title></rect>"
        )
    end = width * len(counts)
    return (
        f'<svg viewBox="0 0 {_WIDTH} 156" role=img aria-label="rows by {escape(unit)}">'
        f"{''.join(bars)}<text x={_LEFT} y=150>0</text>"
        f"<text x={_WIDTH - _RIGHT} y=150 class=end>{end:,} {escape(unit)}</text>"
        f"<text x={_LEFT - 6} y=16 class=end>{most:,}</text></svg>"
    )


def _spell(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
