"""Numbers as a person reads them."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, without an exponent for everyday sizes: 0.0893, 12.4, 1,530."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def short(value: float, digits: int = 3) -> str:
    """`number` without zeros that say nothing: 40, 7.5."""
    words = number(value, digits)
    return words.rstrip("0").rstrip(".") if "." in words and "e" not in words else words


def percent(fraction: float | None) -> str:
    """0.184 is 18 %; one decimal below 10 %."""
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{100 * fraction:.{1 if abs(fraction) < 0.0995 else 0}f} %"


def data(count: float) -> str:
    """Bytes in the largest unit that leaves a number over one."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{short(count)} {unit}"


def energy(joules: float) -> str:
    """Joules, kilojoules from 1000 on."""
    return f"{short(joules)} J" if abs(joules) < 999.5 else f"{short(joules / 1000)} kJ"


def duration(seconds: float) -> str:
    """8.2 s, 2 min 5 s, 3 h 10 min."""
    if seconds < 59.95:
        return f"{short(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
