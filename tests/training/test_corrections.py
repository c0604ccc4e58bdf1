"""FedProx's term, SCAFFOLD's correction and SGD in a cohort, against one client at a time by torch's own optimisers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.base.base import Base
from models.lora.adapter import Adapter, Factors, split_rank
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    assert_same_bits,
    job,
    live,
    private,
    random_bases,
    some,
    trained,
)
from training.cohort import train
from training.jobs import TrainedAdapter, TrainJob
from training.optimizer import SGD

DIGITS = 1e-9


def scaled(adapter: Adapter, by: float) -> Adapter:
    return {name: Factors(by * a, by * b) for name, (a, b) in adapter.items()}


def cohort(base: Base) -> list[TrainJob]:
    pull = scaled(live(base, 2, 21), 1e-3)
    between = random_bases(base, 2, 2)
    inside = {name: Factors(a, left @ torch.ones(2, 2).to(left)) for name, (a, left) in between.items()}
    sgd = {"optimizer": "sgd", "learning_rate": 0.3}
    return [
        job(base, "neither", steps=2),
        private(base, "both, private", proximal=0.5, correction=pull, steps=2),
        job(base, "scaffold", correction=pull, steps=2, **sgd),
        private(base, "scaffold, private", correction=pull, steps=2, **sgd),
        job(
            base,
            "some sites, lower rank",
            start=some(split_rank(live(base, 2, 1), 1)[0]),
            correction=some(split_rank(pull, 1)[0]),
            proximal=0.2,
            steps=2,
            **sgd,
        ),
        job(
            base,
            "cores",
            start=inside,
            trains="cores",
            lora_xs_bases=between,
            correction=pull,
            proximal=0.2,
            steps=2,
            **sgd,
        ),
        job(base, "A alone", trains="a", correction=pull, proximal=0.2, steps=2, **sgd),
        private(base, "B alone, private", trains="b", correction=pull, proximal=0.2, steps=2, **sgd),
    ]


def test_a_mixed_cohort_equals_the_plain_loop(fine: Base) -> None:
    truth = [Reference(fine, plan).train() for plan in cohort(fine)]
    jobs = cohort(fine)
    for found, plan, wanted in zip(train(fine, jobs, memory=PLENTY, timesteps=2), jobs, truth, strict=True):
        assert_close(found, wanted, plan.start, DIGITS)


def test_neither_is_as_without(base: Base) -> None:
    """To the last bit, beside a client that has both; Adam would make a whole step of a rounding error."""
    alone = train(base, [job(base, "a")], memory=PLENTY, timesteps=2)[0]
    beside = job(base, "b", proximal=1.0, correction=live(base, 2, 3))
    held = train(base, [job(base, "a"), beside], memory=PLENTY, timesteps=2)[0]
    assert_close(held, trained(alone), job(base, "a").start, 1e-4)
    first = dataclasses.replace(job(base, "a"), steps=1)
    plain, prox = (
        train(base, [dataclasses.replace(first, proximal=mu)], memory=PLENTY, timesteps=2)[0] for mu in (0.0, 9.0)
    )
    assert_same_bits(plain, prox)  # where it starts nothing pulls it back


def test_a_strong_pull_keeps_it_near(base: Base) -> None:
    def moved(mu: float) -> float:
        plan = job(base, "a", proximal=mu, optimizer="sgd", learning_rate=0.2, steps=8)
        found = trained(train(base, [plan], memory=PLENTY, timesteps=2)[0])
        return sum(float((found[name].b - plan.start[name].b).square().sum()) for name in found)

    assert moved(4.0) < 0.5 * moved(0.0)


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"optimizer": "lion"}, "adamw or sgd"), ({"proximal": -1.0}, "0 or more")]
)
def test_what_no_job_may_ask_for(base: Base, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        job(base, "a", **changes)


def test_a_correction_that_does_not_fit_fails_alone(base: Base) -> None:
    wrong = job(base, "wrong", correction=live(base, 3, 1))
    found = train(base, [wrong, job(base, "sound")], memory=PLENTY, timesteps=2)
    assert isinstance(found[0], ValueError)
    assert "correction" in str(found[0])
    assert isinstance(found[1], TrainedAdapter)


def test_sgd_rows_are_their_own() -> None:
    rows = torch.arange(6.0).view(3, 2)
    optimizer = SGD(rows)
    optimizer.reset([0, 2], [0.5, 0.25])
    optimizer.step([2, 0], torch.tensor([[4.0, 8.0], [2.0, -2.0]]))
    assert rows.tolist() == [[-1.0, 2.0], [2.0, 3.0], [3.0, 3.0]]
