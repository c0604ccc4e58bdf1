"""Principal directions of people's own B, and the fit of coefficients over them."""

from __future__ import annotations

import pytest
import torch

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, init_adapter
from models.lora.directions import combine, divide
from tests.helpers.devices import SITES, adapter
from tests.helpers.driven import drive, plain_job
from training.jobs import Job, Result, TrainedAdapter, TrainJob
from training.personalization import build
from training.personalization.directions import LearnedDirections
from training.personalization.population import Population

RANK, NUMBER = 2, 2


def people(coefficients: list[list[float]]) -> tuple[Adapter, list[Adapter]]:
    """Return the shared adapter, and one person for each row, along planted directions around it."""
    shared, generator = adapter(RANK), torch.Generator().manual_seed(3)
    planted = {name: torch.randn(NUMBER, *b.shape, generator=generator) for name, (_, b) in shared.items()}
    return shared, [
        {name: Factors(a, b + combine(planted[name], torch.tensor(row))) for name, (a, b) in shared.items()}
        for row in coefficients
    ]


def answer(job: Job) -> Result:
    """Fit coefficients of 1; add 1 to a LoRA."""
    assert isinstance(job, TrainJob)
    if job.directions is not None:
        ones = torch.ones(NUMBER)
        fitted = {n: Factors(f.a, combine(job.directions[n], ones)) for n, f in job.start.items()}
        return TrainedAdapter(fitted, 0.0, job.steps, coefficients=ones)
    return TrainedAdapter({n: Factors(f.a + 1, f.b + 1) for n, f in job.start.items()}, 0.1, job.steps)


def test_every_person_is_a_combination_of_directions() -> None:
    """The second moments of their coefficients are 0 and 1; the product is the shared one."""
    shared, trained = people([[1.0, 0.0], [-2.0, 1.0], [0.0, 3.0], [4.0, -1.0], [0.5, 0.5]])
    extended = Population(number=NUMBER).after_last_round(shared, trained)
    _, directions = divide(extended, NUMBER)
    basis = torch.cat([directions[name].flatten(1) for name in SITES], dim=1)
    changes = torch.stack([torch.cat([(p[n].b - shared[n].b).flatten() for n in SITES]) for p in trained])
    found = torch.linalg.lstsq(basis.T, changes.T).solution.T
    torch.testing.assert_close(found @ basis, changes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.T @ found / len(trained), torch.eye(NUMBER), atol=1e-5, rtol=0)
    for name, (a, b) in extended.items():
        torch.testing.assert_close(b @ a, shared[name].b @ shared[name].a, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_missing_directions_are_zero(count: int) -> None:
    shared, trained = people([[1.0, 2.0], [-2.0, 1.0]][:count])
    same, directions = divide(Population(number=3).after_last_round(shared, trained), 3)
    for name in SITES:
        assert torch.equal(same[name].b, shared[name].b)
        assert [bool(one.any()) for one in directions[name]] == [number < count for number in range(3)]


def test_fit_is_that_of_directions() -> None:
    shared, trained = people([[1.0, 0.0], [-2.0, 1.0], [0.0, 3.0]])
    method = Population(number=NUMBER, steps=7, lr=0.2, prior=0.3)
    extended = method.after_last_round(shared, trained)
    job = plain_job(init_adapter(SITES, 1, 5), frozen=extended)
    result, (fit, lora) = drive(method.fit(job, extended, []), answer)
    same, _ = drive(LearnedDirections(number=NUMBER, steps=7, lr=0.2, prior=0.3).fit(job, extended, []), answer)
    assert isinstance(fit, TrainJob)
    assert isinstance(lora, TrainJob)
    assert (fit.trains, fit.steps, fit.learning_rate, fit.proximal) == ("coefficients", 7, 0.2, 0.3)
    assert lora.trains == "both"
    for name in SITES:
        for one, other in zip(result[name], same[name], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rank", [2, 3])
def test_without_directions_a_lora_is_trained(rank: int) -> None:
    """The last round had too few replies; rank 3 is a multiple of 1 + K by chance."""
    shared = adapter(rank)
    job = plain_job(init_adapter(SITES, 1, 5), frozen=shared)
    result, done = drive(Population(number=NUMBER).fit(job, shared, []), answer)
    assert done == [job]
    assert len(result["up.to_k"].a) == 1


def test_options_are_checked() -> None:
    for option in ("number", "steps", "round_steps"):
        with pytest.raises(AntherError, match=rf"^personalization\.{option}=0: must be 1 or more$"):
            build("population", {option: 0.0})
