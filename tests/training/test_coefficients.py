"""Training of coefficients against the training of B, by the chain rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from models.base.base import Base
from models.lora.directions import CoefficientLayout, Directions, combine, init_directions, personal_adapter
from tests.helpers.reference_trainer import PLENTY, examples, job, nonzero_adapter, private, trained_adapter
from training.buffers import BufferSpec, shared_bytes, trained_layout
from training.cohort import train
from training.jobs import EarlyStopping, TrainedAdapter, TrainJob

pytestmark = pytest.mark.integration

NUMBER = 3


def fitting(base: Base, client: str = "someone", **changes: object) -> TrainJob:
    """A job that fits coefficients on top of a shared adapter."""
    shared = nonzero_adapter(base, 2, 1)
    zero = personal_adapter(shared, directions(base), torch.zeros(NUMBER, dtype=base.full_precision))
    fixed = {"start": zero, "frozen": shared, "trains": "coefficients", "directions": directions(base)}
    return job(base, client, **{**fixed, "optimizer": "sgd", "learning_rate": 0.5, **changes})


def directions(base: Base) -> Directions:
    drawn = init_directions(nonzero_adapter(base, 2, 1), NUMBER, seed=4, scale=0.3)
    return {name: tensor.to(base.full_precision) for name, tensor in drawn.items()}


def results(base: Base, jobs: Sequence[TrainJob]) -> list[TrainedAdapter]:
    outcomes = train(base, jobs, memory=PLENTY, timesteps=2)
    assert all(isinstance(outcome, TrainedAdapter) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


def test_first_step_is_inner_product_with_the_gradient_of_b(fine: Base) -> None:
    """ΔB = −η ∂/∂B of a step on B gives Δc_k = Σ ⟨ΔB, D_k⟩ over all sites."""
    shared = nonzero_adapter(fine, 2, 1)
    (on_b,) = results(
        fine, [job(fine, "someone", start=shared, trains="b", optimizer="sgd", learning_rate=0.5, steps=1)]
    )
    (fitted,) = results(fine, [fitting(fine, steps=1)])
    expected = sum(
        torch.einsum("kor,or->k", directions(fine)[name], on_b.adapter[name].b - shared[name].b) for name in shared
    )
    assert fitted.coefficients is not None
    torch.testing.assert_close(fitted.coefficients, expected, rtol=1e-9, atol=1e-12)
    for name, factors in fitted.adapter.items():
        torch.testing.assert_close(factors.b, combine(directions(fine)[name], fitted.coefficients))
        assert torch.equal(factors.a, shared[name].a)


def test_results_do_not_depend_on_other_jobs(fine: Base) -> None:
    others = [fitting(fine, "another", count=4), job(fine, "plain"), fitting(fine, "third", steps=2)]
    together = results(fine, [*others, fitting(fine)])
    (alone,) = results(fine, [fitting(fine)])
    torch.testing.assert_close(together[-1].coefficients, alone.coefficients, rtol=1e-9, atol=1e-12)


def test_prior_pulls_coefficients_to_zero(fine: Base) -> None:
    free, held = results(fine, [fitting(fine, steps=6), fitting(fine, "someone", steps=6, proximal=0.5)])
    assert free.coefficients is not None
    assert held.coefficients is not None
    assert held.coefficients.norm() < 0.7 * free.coefficients.norm()


def test_best_coefficients_are_kept(fine: Base) -> None:
    stopping = EarlyStopping(validation=examples(fine, 2, 9), every=1, patience=50)
    (kept,) = results(fine, [fitting(fine, steps=3, learning_rate=1e4, early_stopping=stopping)])
    assert kept.coefficients is not None
    assert kept.coefficients.norm() < 1e4
    assert math.isfinite(kept.loss)


def test_wrong_jobs_are_refused(fine: Base) -> None:
    with pytest.raises(ValueError, match="directions requires"):
        replace(fitting(fine), directions=None)
    with pytest.raises(ValueError, match="directions requires"):
        job(fine, "plain", directions=directions(fine))
    with pytest.raises(ValueError, match="not trained privately"):
        private(fine, "someone", trains="coefficients", directions=directions(fine))
    some = dict(list(directions(fine).items())[:1])
    for wrong in (some, {name: tensor[:, :1] for name, tensor in directions(fine).items()}):
        (error,) = train(fine, [fitting(fine, directions=wrong)], memory=PLENTY, timesteps=2)
        assert isinstance(error, ValueError)
        assert "directions" in str(error)


def test_trained_adapter_has_the_rank_of_the_shared_one(fine: Base) -> None:
    adapter = trained_adapter(results(fine, [fitting(fine)])[0])
    assert {factors.a.shape[0] for factors in adapter.values()} == {2}


def test_fixed_factors_are_counted_exactly(fine: Base) -> None:
    spec = BufferSpec.of([fitting(fine, frozen=None)])
    layout = trained_layout(fine, spec)
    assert isinstance(layout, CoefficientLayout)
    held = [*layout._a.values(), *layout._directions.values()]
    assert shared_bytes(fine, spec) == sum(tensor.nbytes for tensor in held)
