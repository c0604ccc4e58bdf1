"""Plots of an audit as inline SVG, colored by the page's style sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

import numpy as np
from markupsafe import Markup, escape

from privacy.audit.membership import Interval
from server.report.charts import nice_ticks
from server.report.formatting import short

WIDTH, HEIGHT = 480, 300
LEFT, TOP, BOTTOM, RIGHT = 52, 14, 38, 14
MIN_RATE = 1e-3  # start of logarithmic axes of rates
ROW_HEIGHT = 26  # of a plot of intervals


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in order."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str  # class of the style sheet: base, local, shared, personal, ink
    dashed: bool = False
    dots: bool = False


def curves(lines: Sequence[Curve], *, x_label: str, y_label: str) -> Markup:
    """Plot curves with their labels on linear axes from 0.

    Args:
        lines: curves to plot.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
    """
    x_ticks = nice_ticks(0.0, max(max(curve.x) for curve in lines))
    y_ticks = nice_ticks(0.0, max(max(curve.y) for curve in lines))
    return _plot(lines, x_ticks, y_ticks, lambda x: x / x_ticks[-1], lambda y: y / y_ticks[-1], x_label, y_label)


def rate_curves(lines: Sequence[Curve], *, x_label: str, y_label: str) -> Markup:
    """Plot rates on logarithmic axes, since their lower end matters (Carlini et al., 2022, §4).

    Args:
        lines: curves to plot, with rates of 0 to 1 in both directions.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
    """
    ticks = [MIN_RATE, 1e-2, 1e-1, 1.0]

    def position(rate: float) -> float:
        return 1 - log10(max(rate, MIN_RATE)) / log10(MIN_RATE)

    return _plot(lines, ticks, ticks, position, position, x_label, y_label, low_legend=True)


def histograms(inside: np.ndarray, outside: np.ndarray, weights: np.ndarray, *, x_label: str) -> Markup:
    """Plot the distributions of scores, without the outermost 1 % on each side.

    Args:
        inside: scores of members.
        outside: scores of non-members.
        weights: weight of each non-member.
        x_label: label of the axis of scores.
    """
    scores = np.concatenate([inside, outside])
    low, high = (float(end) for end in np.quantile(scores, [0.01, 0.99]))
    edges = np.linspace(low, high if high > low else low + 1, 31)
    shares = [np.histogram(inside, edges)[0] / len(inside)]
    shares.append(np.histogram(outside, edges, weights=weights)[0] / max(weights.sum(), 1e-12))
    top = max(float(share.max()) for share in shares) or 1.0
    corners = edges.repeat(2)[1:-1]
    lines = [
        Curve(label, (corners - edges[0]).tolist(), (share.repeat(2) / top).tolist(), tone)
        for label, share, tone in zip(("members", "others"), shares, ("personal", "base"), strict=True)
    ]
    width = float(edges[-1] - edges[0])
    return _plot(lines, [], [], lambda x: x / width, lambda y: y, x_label, "share")


def intervals(rows: Sequence[tuple[str, Interval, str]], *, chance: float, low: float, high: float) -> Markup:
    """Plot a horizontal line for each (name, interval, tone), and a dashed line at chance.

    Args:
        rows: the intervals.
        chance: value of a random guess.
        low: start of the axis.
        high: end of the axis.
    """
    left, height = 178, ROW_HEIGHT * len(rows) + 40

    def across(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (WIDTH - left - 116)

    parts = []
    for tick in nice_ticks(low, high, 4):
        if low - 1e-9 <= tick <= high + 1e-9:
            at = f"{across(tick):.1f}"
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="6" y2="{height - 26}"/>')
            parts.append(f'<text class="tick" x="{at}" y="{height - 10}" text-anchor="middle">{short(tick)}</text>')
    at = f"{across(chance):.1f}"
    parts.append(f'<line class="curve ink" stroke-dasharray="3 4" x1="{at}" x2="{at}" y1="6" y2="{height - 26}"/>')
    for index, (name, interval, tone) in enumerate(rows):
        y = 18 + ROW_HEIGHT * index
        parts += [
            f'<text class="tick" x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<line class="curve {tone}" x1="{across(interval.low):.1f}" x2="{across(interval.high):.1f}" '
            f'y1="{y}" y2="{y}"/>',
            f'<circle class="dot {tone}" cx="{across(interval.value):.1f}" cy="{y}" r="4"/>',
            f'<text class="tick" x="{WIDTH - 100}" y="{y + 4}">{interval.value:.3f} ± '
            f"{(interval.high - interval.low) / 2:.3f}</text>",
        ]
    return _svg(parts, "; ".join(f"{name}: {interval.value:.3f}" for name, interval, _ in rows), height)


def _plot(
    lines: Sequence[Curve],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_label: str,
    y_label: str,
    *,
    low_legend: bool = False,
) -> Markup:
    def px(x: float) -> float:
        return LEFT + across(x) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - up(y) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        at = f"{py(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        at = f"{px(tick):.1f}"
        parts.append(
            f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="tick" transform="translate(12 {(HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for curve in lines:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
        dash = ' stroke-dasharray="5 5"' if curve.dashed else ""
        parts.append(f'<polyline class="curve {curve.tone}" points="{points}"{dash}/>')
        for dot in zip(curve.x, curve.y, strict=True) if curve.dots else ():
            words = escape(f"{curve.label}: {short(dot[1])} at {short(dot[0])}")
            parts.append(
                f'<circle class="dot {curve.tone}" cx="{px(dot[0]):.1f}" cy="{py(dot[1]):.1f}" r="3.5">'
                f"<title>{words}</title></circle>"
            )
    for index, curve in enumerate(lines):
        x, anchor = (WIDTH - RIGHT - 8, "end") if low_legend else (LEFT + 12, "start")
        y = HEIGHT - BOTTOM - 12 - 17 * (len(lines) - 1 - index) if low_legend else TOP + 14 + 17 * index
        words = escape(curve.label)
        parts.append(f'<text class="end {curve.tone}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>')
    return _svg(parts, f"{y_label} by {x_label}: " + ", ".join(curve.label for curve in lines), HEIGHT)


def _svg(parts: Sequence[str], summary: str, height: float) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(summary)}">'
        + "".join(parts)
        + "</svg>"
    )
