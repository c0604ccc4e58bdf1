"""Tests of the choice of settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from bench.quality.people_local import LocalTask
from bench.quality.people_settings import LocalSettings, PeopleSettings
from bench.quality.people_tune import best_local, combinations, mean_losses, scaled_rate, tune_local, variations
from common.errors import AntherError


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


SETTINGS = PeopleSettings(federation=())


@dataclass(frozen=True)
class PlannedExperiment:
    """Makes tasks of no people."""

    settings: PeopleSettings = SETTINGS
    seeds: tuple[int, ...] = (0,)

    def total_steps(self, letters: int) -> int:
        return 2 * letters

    def local(self, _: int, __: int, settings: Sequence[LocalSettings], total: int, *, grid: bool) -> LocalTask:
        return LocalTask((), tuple(settings), total, self.settings.every, grid)


class PlannedWorkers:
    """Answers with losses that a planted setting minimizes."""

    def __init__(self, best: LocalSettings) -> None:
        self.best, self.tasks = best, 0

    def local(self, _: str, task: LocalTask) -> Future[list[dict[str, Any]]]:
        self.tasks += 1
        future: Future[list[dict[str, Any]]] = Future()
        future.set_result([record(1, loss, loss + 0.1) for loss in map(self.loss, task.settings)])
        return future

    def loss(self, setting: LocalSettings) -> float:
        if setting.lr > 0.003:
            return math.inf  # it diverged
        wrong = [getattr(setting, name) != getattr(self.best, name) for name in ("sites", "rank", "proximal")]
        return 0.5 + 0.01 * sum(wrong) + abs(math.log(setting.lr / self.best.lr))


def test_changes_lead_to_the_planted_setting() -> None:
    best = LocalSettings(sites="linear", rank=4, lr=0.001 * 1.4, proximal=0.01, steps=5)
    workers: Any = PlannedWorkers(best)
    found, scores = tune_local(PlannedExperiment(), workers, [2, 5], [1, 5], changes=3)  # type: ignore[arg-type]
    assert found == {"1": best, "2": best, "5": best}
    assert workers.tasks == 2 * (2 + 3) + 1
    assert {row["loss"] for row in scores if row["lr"] > 0.003} == {1.0}  # the base's


def test_failed_federation_is_no_candidate() -> None:
    failed: Future[dict[str, Any]] = Future()
    failed.set_exception(AntherError("training became not finite"))
    assert mean_losses(failed, ("base", "shared")) == {"base": math.inf, "shared": math.inf}


def test_rate_is_scaled() -> None:
    assert scaled_rate(["rounds=2", "adapter.shared.lr=0.3"], 0.5) == ("rounds=2", "adapter.shared.lr=0.15")
