"""Checks of configured values: each raises ValueError with one line that names the key."""

from __future__ import annotations

import re

from omegaconf import MISSING


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_choice(key: str, value: str, options: tuple[str, ...]) -> None:
    """Require one of `options`; a missing value passes, because Hydra reports it.

    Args:
        key: full name of the key, for the message.
        value: configured value.
        options: allowed values.
    """
    require(value in (*options, MISSING), f"{key}={value}: must be one of: {', '.join(options)}")


def require_color(key: str, color: str) -> None:
    """Require a color for the background of transparent pictures."""
    known = color in ("white", "black", "gray") or re.fullmatch(r"#[0-9a-fA-F]{6}", color)
    require(bool(known), f"{key}={color}: must be white, black, gray or '#rrggbb'")


def none_or_positive(value: float | None) -> bool:
    """Return whether a value is unset or over 0."""
    return value is None or value > 0


def is_regex(pattern: str) -> bool:
    """Return whether a pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
