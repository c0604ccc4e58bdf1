"""Human-readable numbers."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """Format with a few significant digits, without an exponent for common magnitudes: 0.0893, 12.4, 1,530."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def short(value: float, digits: int = 3) -> str:
    """Format as `number`, without trailing zeros: 40, 7.5."""
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def percent(fraction: float | None) -> str:
    """Format a fraction: 0.184 is 18 %; one decimal below 10 %."""
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{100 * fraction:.{1 if abs(fraction) < 0.0995 else 0}f} %"


def data(count: float) -> str:
    """Format bytes in the largest unit with a value above one."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{short(count)} {unit}"


def energy(joules: float) -> str:
    """Format joules, as kilojoules from 1000 on."""
    return f"{short(joules)} J" if abs(joules) < 999.5 else f"{short(joules / 1000)} kJ"


def duration(seconds: float) -> str:
    """Format seconds: 8.2 s, 2 min 5 s, 3 h 10 min."""
    if seconds < 59.95:
        return f"{short(seconds, 2)} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remaining_seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
