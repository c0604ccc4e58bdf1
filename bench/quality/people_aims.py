"""Aims of `anther bench people`, each a bound on one number of the results. Its interval is shown, but not required."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Aim(NamedTuple):
    """One aim, on a number of the results."""

    text: str
    path: tuple[str, ...]
    """Keys of an estimate or a number in the results."""
    bound: float
    at_most: bool = False


AIMS = (
    Aim("5 letters: gain of people in a federation, relative to local training", ("letters-5", "ratio"), 1.6),
    Aim("the same, if local training stops at its best step on the test letters", ("letters-5", "oracle_ratio"), 1.6),
    Aim("5 letters: fraction of people with a lower loss than locally", ("letters-5", "better"), 0.97),
    Aim("2 letters: gain of people in a federation, relative to local training", ("letters-2", "ratio"), 1.9),
    Aim("steps until the best loss of local training, relative to its own", ("steps", "fraction"), 0.2, at_most=True),
    Aim("newcomers: share of members' gain", ("newcomers", "share"), 0.95),
    Aim("hands of a donor without members: share of members' gain", ("donors", "share"), 0.8),
    Aim("ε = 8 per image: share of the open shared gain", ("private", "example-8", "share"), 0.75),
    Aim("ε = 2 per image: share of the open shared gain", ("private", "example-2", "share"), 0.65),
    Aim("ε = 8 per device: share of the open shared gain", ("private", "device-8", "share"), 0.7),
    Aim(
        "read rate of drawn letters minus that of the people's real ones",
        ("pictures", "shipped", "read_difference"),
        -0.02,
    ),
    Aim("style match, as part of the way from chance to real letters", ("pictures", "shipped", "style_share"), 0.83),
)


def check_aims(results: Mapping[str, Any], aims: Sequence[Aim] = AIMS) -> list[dict[str, Any]]:
    """Compare results with aims; an aim whose number was not measured is left out.

    Args:
        results: the results.
        aims: the aims.
    """
    rows = []
    for aim in aims:
        value: Any = results
        for key in aim.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            continue
        number = value[0] if isinstance(value, list | tuple) else value
        met = number is not None and (number <= aim.bound if aim.at_most else number >= aim.bound)
        rows.append({"aim": aim.text, "bound": aim.bound, "at_most": aim.at_most, "measured": value, "met": bool(met)})
    return rows
