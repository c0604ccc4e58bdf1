"""Alternatives in the messages of refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strategies.registry import AGGREGATIONS


def aggregations(fits: Callable[[Any], bool]) -> str:
    """Return the setting of an aggregation that fits, as `aggregation=exact or fedit`."""
    return f"aggregation={listed([name for name, rule in AGGREGATIONS.items() if fits(rule)])}"


def listed(names: list[str]) -> str:
    return " or ".join(names)
