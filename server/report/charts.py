"""Line charts as inline SVG, colored by the page's style sheet, so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 250
LEFT, TOP, BOTTOM = 62, 14, 36
LABELS = 84  # space at the right for the names of curves
DOTS = 60  # largest number of rounds with a dot, and a tooltip, for each value
LABEL_GAP = 16  # minimum distance between two labels at line ends

ValueFormat = Callable[[float], str]


@dataclass(frozen=True)
class LineSeries:
    """One curve: a value for each x; None: no value."""

    label: str
    values: Sequence[float | None]
    tone: str  # class of the style sheet: base, local, shared, personal, ink
    dashed: bool = False


def line_chart(
    x: Sequence[int], lines: Sequence[LineSeries], show: ValueFormat, *, from_zero: bool, x_label: str
) -> Markup:
    """Draw curves over rounds; several curves are labeled at their ends.

    Args:
        x: numbers of the rounds.
        lines: curves.
        show: formats a value for ticks and tooltips.
        from_zero: whether the axis includes 0.
        x_label: title of the x axis.

    Returns:
        The SVG; empty if there is no value, or only zeros from zero.
    """
    lines = [line for line in lines if any(value is not None for value in line.values)]
    present = [value for line in lines for value in line.values if value is not None]
    if not present or (from_zero and not any(present)):
        return Markup("")  # no values, or only zeros
    ticks = nice_ticks(min([0.0, *present] if from_zero else present), max(present))
    low, high = ticks[0], ticks[-1]
    right = WIDTH - (LABELS if len(lines) > 1 else 14)

    def x_position(value: float) -> float:
        span = max(x) - min(x)
        share = (value - min(x)) / span if span else 0.5
        return LEFT + share * (right - LEFT)

    def y_position(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y_position(t):.1f}" y2="{y_position(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y_position(t) + 4:.1f}" text-anchor="end">{escape(show(t))}</text>'
        for t in ticks
    ]
    parts += [
        f'<text class="tick" x="{x_position(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t}</text>'
        for t in whole_ticks(min(x), max(x))
    ]
    middle = (LEFT + right) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    ends = spread([y_position(last(line.values)) for line in lines])
    for line, end in zip(lines, ends, strict=True):
        points = [
            (x_position(round_number), y_position(value))
            for round_number, value in zip(x, line.values, strict=True)
            if value is not None
        ]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        dash = ' stroke-dasharray="5 5"' if line.dashed else ""
        parts.append(f'<polyline class="curve {line.tone}" points="{path}"{dash}/>')
        for round_number, value in zip(x, line.values, strict=True):
            if value is not None and not line.dashed and len(x) <= DOTS:
                words = escape(f"{x_label} {round_number}: {line.label} {show(value)}")
                parts.append(
                    f'<circle class="dot {line.tone}" cx="{x_position(round_number):.1f}" cy="{y_position(value):.1f}" '
                    f'r="3.5"><title>{words}</title></circle>'
                )
        if len(lines) > 1:
            parts.append(
                f'<text class="end {line.tone}" x="{right + 10}" y="{end + 4:.1f}">{escape(line.label)}</text>'
            )
    summary = "; ".join(f"{line.label}: {show(first(line.values))} to {show(last(line.values))}" for line in lines)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        + "".join(parts)
        + "</svg>"
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values that enclose [low, high].

    Args:
        low: smallest value.
        high: largest value.
        count: approximate number of ticks.
    """
    if high <= low:
        low, high = (0.0, high) if high > 0 else (low - 1, low + 1)
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(start, stop + 1)]


def whole_ticks(low: int, high: int, max_steps: int = 8) -> list[int]:
    """Return evenly spaced integers.

    Args:
        low: first integer.
        high: largest integer.
        max_steps: maximum number of steps between them.
    """
    step = max(1, math.ceil((high - low) / max_steps))
    return list(range(low, high + 1, step))


def spread(positions: Sequence[float]) -> list[float]:
    """Return positions near the given ones, in the same order, at least LABEL_GAP apart."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(len(placed)):
        for above, below in pairwise(range(len(placed))):
            if (overlap := LABEL_GAP - (placed[below] - placed[above])) > 0:
                placed[above] -= overlap / 2
                placed[below] += overlap / 2
    result = [0.0] * len(positions)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result


def first(values: Sequence[float | None]) -> float:
    """Return the first value that is not None; NaN if there is none."""
    return next((value for value in values if value is not None), math.nan)


def last(values: Sequence[float | None]) -> float:
    """Return the last value that is not None; NaN if there is none."""
    return first(list(reversed(values)))
