"""Rules on combinations of components and settings of a strategy, each in one place.

    combination(config) ─┐
                         ├─> Combination ─> first_reason ─> one line, or None
    of_parts(plan, …) ───┘

`strategies.validation.privacy` has the rules for combinations that can be private, `strategies.validation.rules` all
others. A configuration is checked before a base is loaded, the arguments of a strategy when it is constructed.
"""

from __future__ import annotations

from common.errors import AntherError
from strategies.validation.combination import Combination
from strategies.validation.rules import RULES


class CombinationError(AntherError, ValueError):
    """Components or settings that contradict each other: a user's mistake, and a wrong argument of the strategy."""


def first_reason(combination: Combination) -> str | None:
    """Return in one line why a combination is refused, with the keys and the remedy; None if it can run."""
    return next((reason for rule in RULES if (reason := rule(combination))), None)


def check(combination: Combination) -> None:
    """Refuse a combination that can't run.

    Raises:
        CombinationError: components or settings contradict each other.
    """
    if reason := first_reason(combination):
        raise CombinationError(reason)
