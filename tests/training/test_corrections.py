"""FedProx, SCAFFOLD and SGD in a cohort, compared with one client at a time by torch's own optimizers."""

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
    at_some_sites,
    job,
    nonzero_adapter,
    private,
    random_bases,
    trained_adapter,
)
from training.cohort import train
from training.jobs import TrainedAdapter, TrainJob
from training.optimizer import SGD

DIGITS = 1e-9


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return {name: Factors(factor * a, factor * b) for name, (a, b) in adapter.items()}


def cohort(base: Base) -> list[TrainJob]:
    pull = scaled(nonzero_adapter(base, 2, 21), 1e-3)
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
            start=at_some_sites(split_rank(nonzero_adapter(base, 2, 1), 1)[0]),
            correction=at_some_sites(split_rank(pull, 1)[0]),
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


@pytest.mark.integration
def test_mixed_cohort_matches_reference(fine: Base) -> None:
    truth = [Reference(fine, plan).train() for plan in cohort(fine)]
    jobs = cohort(fine)
    for result, plan, expected in zip(train(fine, jobs, memory=PLENTY, timesteps=2), jobs, truth, strict=True):
        assert_close(result, expected, plan.start, DIGITS)


@pytest.mark.integration
def test_zero_corrections_change_nothing(base: Base) -> None:
    """Exactly, next to a client with both; Adam would turn a rounding error into a whole step."""
    alone = train(base, [job(base, "a")], memory=PLENTY, timesteps=2)[0]
    beside = job(base, "b", proximal=1.0, correction=nonzero_adapter(base, 2, 3))
    stored = train(base, [job(base, "a"), beside], memory=PLENTY, timesteps=2)[0]
    assert_close(stored, trained_adapter(alone), job(base, "a").start, 1e-4)
    first = dataclasses.replace(job(base, "a"), steps=1)
    plain, prox = (
        train(base, [dataclasses.replace(first, proximal=mu)], memory=PLENTY, timesteps=2)[0] for mu in (0.0, 9.0)
    )
    assert_same_bits(plain, prox)  # the term is zero at the start


@pytest.mark.integration
def test_strong_proximal_term_limits_the_change(base: Base) -> None:
    def moved(mu: float) -> float:
        plan = job(base, "a", proximal=mu, optimizer="sgd", learning_rate=0.2, steps=8)
        result = trained_adapter(train(base, [plan], memory=PLENTY, timesteps=2)[0])
        return sum(float((result[name].b - plan.start[name].b).square().sum()) for name in result)

    assert moved(4.0) < 0.5 * moved(0.0)


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"optimizer": "lion"}, "adamw or sgd"), ({"proximal": -1.0}, "0 or more")]
)
def test_invalid_jobs_are_rejected(base: Base, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        job(base, "a", **changes)


def test_misshapen_correction_fails_its_own_job(base: Base) -> None:
    wrong = job(base, "wrong", correction=nonzero_adapter(base, 3, 1))
    result = train(base, [wrong, job(base, "sound")], memory=PLENTY, timesteps=2)
    assert isinstance(result[0], ValueError)
    assert "correction" in str(result[0])
    assert isinstance(result[1], TrainedAdapter)


def test_sgd_rows_are_independent() -> None:
    rows = torch.arange(6.0).view(3, 2)
    optimizer = SGD(rows)
    optimizer.reset([0, 2], [0.5, 0.25])
    optimizer.step([2, 0], torch.tensor([[4.0, 8.0], [2.0, -2.0]]))
    assert rows.tolist() == [[-1.0, 2.0], [2.0, 3.0], [3.0, 3.0]]
