"""SVG plots for the pages in docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import median

WIDTH, LEFT, ROW, TOP = 190, 120, 18, 34  # pixels of a small plot
SIDE, RIGHT = 300, 250  # pixels of a scatter plot and of its legend
INK, FAINT, MARK, BEST = "#333", "#ddd", "#4878a8", "#c0504d"
COLORS = ("#c0504d", "#4878a8", "#6a9a4a", "#b8860b", "#7b5ea7", "#3a9a9a")

Point = tuple[float, float]


def dots(settings: Sequence[str], cells: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """Draw a small plot for each setting: a row for each rule with its gain and interval, the highest gain in red.

    Args:
        settings: names of the settings.
        cells: (gain, lower end, upper end) by (rule, setting).
    """
    rules = list(dict.fromkeys(rule for rule, _ in cells))
    high = max(gain[2] for gain in cells.values())
    columns = 4
    lines = -(-len(settings) // columns)
    width, height = LEFT + columns * WIDTH, lines * (TOP + len(rules) * ROW + 26)
    parts = [_head(width, height)]
    for index, name in enumerate(settings):
        line, column = divmod(index, columns)
        x, y = LEFT + column * WIDTH, line * (TOP + len(rules) * ROW + 26)
        scale = (WIDTH - 30) / high
        parts.append(f'<text x="{x}" y="{y + 20}" font-weight="bold">{escape(name)}</text>')
        bottom = y + TOP + len(rules) * ROW
        for tick in range(0, int(100 * high) + 1, 5):
            at = x + scale * tick / 100
            parts.append(f'<line x1="{at:.1f}" y1="{y + TOP - 6}" x2="{at:.1f}" y2="{bottom}" stroke="{FAINT}"/>')
            parts.append(f'<text x="{at:.1f}" y="{bottom + 12}" text-anchor="middle" fill="#888">{tick}</text>')
        best = max((rule for rule in rules if (rule, name) in cells), key=lambda rule: cells[rule, name][0])
        for row, rule in enumerate(rules):
            middle = y + TOP + row * ROW + 6
            if column == 0:
                parts.append(f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(rule)}</text>')
            if (rule, name) not in cells:
                continue
            mean, low, top = cells[rule, name]
            color = BEST if rule == best else MARK
            parts.append(
                f'<line x1="{x + scale * max(low, 0):.1f}" y1="{middle}" x2="{x + scale * min(top, high):.1f}" '
                f'y2="{middle}" stroke="{color}" stroke-width="1.5"/>'
                f'<circle cx="{x + scale * mean:.1f}" cy="{middle}" r="3.5" fill="{color}"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def scatter(panels: Mapping[str, Mapping[str, Sequence[Point | None]]], *, x: str, y: str) -> str:
    """Draw a plot for each panel: a color for each arm, a small circle for each run, a large one for their median.

    Args:
        panels: runs by arm; None for a run that missed the target: the arm then has no median, and the legend counts
            the runs that reached it.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    width, height = len(panels) * (60 + SIDE + RIGHT), SIDE + 80
    parts = [_head(width, height)]
    for number, (name, arms) in enumerate(panels.items()):
        left, bottom = 60 + number * (60 + SIDE + RIGHT), SIDE + 40
        points = [point for runs in arms.values() for point in runs if point]
        limits = [1.1 * max(point[axis] for point in points) for axis in (0, 1)]
        parts.append(f'<text x="{left}" y="24" font-weight="bold">{escape(name)}</text>')
        parts += _axes(left, bottom, limits, x, y)
        for index, (arm, runs) in enumerate(arms.items()):
            color, row = COLORS[index % len(COLORS)], 50 + index * ROW
            reached_runs = [run for run in runs if run]
            circles = [(3, 0.6, run) for run in reached_runs]
            if reached_runs and len(reached_runs) == len(runs):
                circles.append(
                    (6, 1.0, (median(run[0] for run in reached_runs), median(run[1] for run in reached_runs)))
                )
            for radius, opacity, (across, up) in circles:
                parts.append(
                    f'<circle cx="{left + SIDE * across / limits[0]:.1f}" cy="{bottom - SIDE * up / limits[1]:.1f}" '
                    f'r="{radius}" fill="{color}" opacity="{opacity}"/>'
                )
            reached = "" if len(reached_runs) == len(runs) else f" ({len(reached_runs)} of {len(runs)} reached it)"
            parts.append(f'<circle cx="{left + SIDE + 20}" cy="{row}" r="5" fill="{color}"/>')
            parts.append(f'<text x="{left + SIDE + 30}" y="{row + 4}">{escape(arm + reached)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]], *, y: str) -> str:
    """Draw a plot for each panel: a line for each arm through its points, with a bar for each interval.

    Args:
        panels: points (x, value, lower end, upper end) by arm, by label of the horizontal axis; its values have equal
            distances if they are not evenly spread.
        y: label of the vertical axes.
    """
    width, height = len(panels) * (60 + SIDE + 20) + RIGHT // 2, SIDE + 80
    names = list(dict.fromkeys(arm for arms in panels.values() for arm in arms))
    parts = [_head(width, height)]
    for number, (label, arms) in enumerate(panels.items()):
        left, bottom = 60 + number * (60 + SIDE + 20), SIDE + 40
        ticks = sorted({point[0] for points in arms.values() for point in points})
        high = 1.1 * max(max(point[1:]) for points in arms.values() for point in points)
        place = {tick: left + SIDE * (index + 0.5) / len(ticks) for index, tick in enumerate(ticks)}
        parts += _levels(left, bottom, high)
        parts += [
            f'<text x="{place[tick]:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>'
            for tick in ticks[:: -(-len(ticks) // 12)]
        ]
        parts.append(f'<text x="{left + SIDE / 2}" y="{bottom + 30}" text-anchor="middle">{escape(label)}</text>')
        parts.append(f'<text x="{left + 6}" y="{bottom - SIDE - 4}">{escape(y)}</text>')
        for arm, points in arms.items():
            color = COLORS[names.index(arm) % len(COLORS)]
            heights = [[bottom - SIDE * max(value, 0) / high for value in point[1:]] for point in points]
            line = " ".join(f"{place[point[0]]:.1f},{at[0]:.1f}" for point, at in zip(points, heights, strict=True))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
            for point, (middle, low, top) in zip(points, heights, strict=True):
                across = f"{place[point[0]]:.1f}"
                parts.append(f'<line x1="{across}" y1="{low:.1f}" x2="{across}" y2="{top:.1f}" stroke="{color}"/>')
                parts.append(f'<circle cx="{across}" cy="{middle:.1f}" r="3" fill="{color}"/>')
    for row, arm in enumerate(names):
        x, at = width - RIGHT // 2 + 10, 50 + row * ROW
        parts.append(f'<rect x="{x}" y="{at - 4}" width="10" height="8" fill="{COLORS[row % len(COLORS)]}"/>')
        parts.append(f'<text x="{x + 16}" y="{at + 4}">{escape(arm)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _levels(left: int, bottom: int, high: float) -> Iterator[str]:
    for part in range(5):
        up = bottom - SIDE * part / 4
        yield f'<line x1="{left}" y1="{up:.1f}" x2="{left + SIDE}" y2="{up:.1f}" stroke="{FAINT}"/>'
        yield f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{high * part / 4:.2f}</text>'


def _axes(left: int, bottom: int, limits: Sequence[float], x: str, y: str) -> Iterator[str]:
    for part in range(5):
        share = part / 4
        across, up = left + SIDE * share, bottom - SIDE * share
        yield f'<line x1="{across:.1f}" y1="{bottom}" x2="{across:.1f}" y2="{bottom - SIDE}" stroke="{FAINT}"/>'
        yield f'<line x1="{left}" y1="{up:.1f}" x2="{left + SIDE}" y2="{up:.1f}" stroke="{FAINT}"/>'
        yield f'<text x="{across:.1f}" y="{bottom + 14}" text-anchor="middle">{share * limits[0]:.1f}</text>'
        yield f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{share * limits[1]:.2f}</text>'
    yield f'<text x="{left + SIDE / 2}" y="{bottom + 30}" text-anchor="middle">{escape(x)}</text>'
    yield f'<text x="{left + 6}" y="{bottom - SIDE - 4}">{escape(y)}</text>'


def _head(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11" fill="{INK}"><rect width="100%" height="100%" fill="white"/>'
    )
