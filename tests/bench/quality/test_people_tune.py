"""Tests of the choice of settings."""

from __future__ import annotations

from typing import Any

from bench.quality.people_settings import LocalSettings
from bench.quality.people_tune import best_local, combinations, scaled_rate, variations


def record(*curve: float, stopped: float = 1.0) -> dict[str, Any]:
    """Make the curves of two people with this mean."""
    curves = [[loss - 0.1 for loss in curve], [loss + 0.1 for loss in curve]]
    return {"steps": [0, 5, 10], "curve": curves, "stopped": [stopped, stopped]}


def test_grid_has_every_combination() -> None:
    assert combinations(["a=1,2", "b.c=x"]) == [("a=1", "b.c=x"), ("a=2", "b.c=x")]
    assert combinations([]) == [()]


def test_best_number_of_steps_is_chosen() -> None:
    slow, fast = LocalSettings(lr=0.001), LocalSettings(lr=0.01)
    setting, loss = best_local([(slow, record(1, 0.8, 0.7)), (fast, record(1, 0.6, 0.9))])
    assert (setting, round(loss, 6)) == (LocalSettings(lr=0.01, steps=5), 0.6)


def test_stopping_by_validation_is_scored_where_it_ends() -> None:
    fixed, validated = LocalSettings(), LocalSettings(validated=True)
    assert best_local([(fixed, record(1, 0.6, 0.9)), (validated, record(1, 0.5, 0.9, stopped=0.7))])[0].steps == 5
    assert best_local([(fixed, record(1, 0.6, 0.9)), (validated, record(1, 0.5, 0.9, stopped=0.55))])[0].validated


def test_variations_change_one_field() -> None:
    best = LocalSettings(prior=0.3)
    fields = [
        [name for name in LocalSettings.__dataclass_fields__ if getattr(setting, name) != getattr(best, name)]
        for setting in variations(best)
    ]
    assert all(len(names) == 1 for names in fields)
    assert {names[0] for names in fields} == {"rank", "lr", "proximal", "prior", "validated"}


def test_rate_is_scaled() -> None:
    assert scaled_rate(["rounds=2", "adapter.shared.lr=0.3"], 0.5) == ("rounds=2", "adapter.shared.lr=0.15")
