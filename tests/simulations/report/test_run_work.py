"""Estimated work of a run, and the time left that follows from it."""

from __future__ import annotations

import pytest

from conf.schemas import sampling
from simulations.report.run_work import run_work
from simulations.report.time_left import RunWork
from tests.helpers.configs import compose

FEW = (
    "data.writers=10 rounds=4 evaluation.gallery_size=0 evaluation.baseline_local=false cohort.size=5 data.train=6 "
    "adapter.shared.steps=2 adapter.shared.batch_size=3 adapter.personal.steps=8 adapter.personal.batch_size=5 "
    "data.validation=4 evaluation.timesteps=2"
)
MEASURED = 5 * 4 * 2  # validation pictures of five devices, at two timesteps


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "by_round", "after", "drawn"),
    [
        ("", [2, 2, 2, 2], 8, 0),
        ("personalization=prior", [2, 2, 2, 2], 2 * 8, 10 * 6 * sampling.STEPS),
        ("personalization=fedalt personalization.steps=3", [5, 5, 5, 5], 8, 0),
        (
            "personalization=directions aggregation=fedit personalization.round_steps=3 personalization.warmup=1 "
            "personalization.steps=7",
            [2, 5, 5, 5],
            7 + 8,
            0,
        ),
        (
            "personalization=population personalization.round_steps=30 personalization.steps=7",
            [2, 2, 2, 30],
            7 + 8,
            0,
        ),
        ("evaluation.baseline_local=true", [2, 2, 2, 2], 8 + 4 * 2 + 8, 0),
    ],
)
def test_steps_of_methods_are_work(words: str, by_round: list[int], after: int, drawn: int) -> None:
    """A trained example is three forward passes. The base draws a picture for each of 6 captions."""
    work = run_work(compose(f"{FEW} {words}"))
    assert list(work.rounds) == [5 * steps * 3 * 3 + MEASURED for steps in by_round]
    assert work.after == 10 * after * 5 * 3 + drawn


def test_slow_rounds_are_not_expected_again() -> None:
    """Two rounds of work 1, the first with extra work; then one of 10, and 5 after it."""
    work = RunWork([1.0, 1.0, 10.0], after=5.0)
    assert work.seconds_left(2, [9.0, 2.0]) == pytest.approx(2 * 15)
    assert work.seconds_left(3, [9.0, 2.0, 22.0]) == pytest.approx(2 * 5)
    assert work.seconds_left(3, [22.0]) == pytest.approx(22 / 10 * 5)
    assert RunWork([1.0]).seconds_left(1, [3.0]) == 0
