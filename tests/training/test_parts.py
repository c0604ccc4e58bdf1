"""Partial training (some factors or some sites), compared with merged weights and torch's AdamW on those."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from models.base.base import Base
from models.lora import batched_linear
from models.lora.adapter import Adapter, Factors, select_sites
from models.lora.trainable import trained_tensors
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    at_some_sites,
    job,
    memory_for,
    nonzero_adapter,
    private,
    random_bases,
    trained_adapter,
)
from training.buffers import BufferSpec, CohortBuffers, row_bytes
from training.cohort import train
from training.jobs import TrainJob

DIGITS = 1e-10
PARTS = ["a", "b", "cores"]


def between_bases(bases: Adapter, seed: int, base: Base) -> Adapter:
    """Create an adapter between these factors with nonzero cores."""
    at_some_sites = nonzero_adapter(base, len(next(iter(bases.values())).a), seed)
    return {name: Factors(a, left @ (left.T @ at_some_sites[name].b)) for name, (a, left) in bases.items()}


def partial_jobs(base: Base, trains: str, start: Adapter, other: Adapter) -> list[TrainJob]:
    """Create jobs with partial training: three from one adapter, one of them with smaller factors, and one from
    another."""
    head = {name: Factors(a[:1], b[:, :1]) for name, (a, b) in start.items()}
    return [
        job(base, f"{trains} plain", start=start, trains=trains, steps=2),
        job(base, f"{trains} small", start=head, trains=trains, frozen=nonzero_adapter(base, 2, 9), steps=2),
        job(base, f"{trains} elsewhere", start=at_some_sites(other), trains=trains, steps=2),
        private(base, f"{trains} private", count=3, start=start, trains=trains, steps=2),
        private(
            base,
            f"{trains} by site",
            start=at_some_sites(other),
            trains=trains,
            per_site=True,
            count=3,
            batch_size=4,
            steps=2,
        ),
        private(base, f"{trains} nobody", start=start, trains=trains, rate=0.0, steps=1),
    ]


def core_jobs(base: Base) -> list[TrainJob]:
    one, other = random_bases(base, 3, 1), random_bases(base, 2, 2)
    within, beside = between_bases(one, 5, base), between_bases(other, 6, base)
    few = at_some_sites(other)
    return [
        job(base, "plain", start=within, lora_xs_bases=one, trains="cores", steps=2),
        job(
            base,
            "another frame",
            start=beside,
            lora_xs_bases=other,
            trains="cores",
            frozen=nonzero_adapter(base, 2, 9),
            steps=2,
        ),
        private(base, "private", count=3, start=within, lora_xs_bases=one, trains="cores", steps=2),
        private(
            base,
            "clipped by site",
            start=select_sites(beside, few),
            lora_xs_bases=few,
            trains="cores",
            per_site=True,
            count=3,
            batch_size=4,
        ),
        private(base, "nobody", start=within, lora_xs_bases=one, trains="cores", rate=0.0, steps=1),
    ]


def cohort(base: Base) -> list[TrainJob]:
    start, other = nonzero_adapter(base, 3, 5), nonzero_adapter(base, 2, 6)
    empty = nonzero_adapter(base, 0, 6)
    return [
        *partial_jobs(base, "a", start, other)[::3],
        *partial_jobs(base, "b", start, other),
        *core_jobs(base),
        job(base, "factors", steps=2),
        job(base, "factors elsewhere", start=at_some_sites(other), frozen=other, steps=2),
        job(base, "no rank", start=empty, trains="b"),
        job(base, "nowhere", start={}, trains="b"),
    ]


@pytest.mark.integration
def test_partial_training_matches_reference(fine: Base) -> None:
    truth = [Reference(fine, plan).train() for plan in cohort(fine)]
    jobs = cohort(fine)
    for result, plan, expected in zip(train(fine, jobs, memory=PLENTY, timesteps=2), jobs, truth, strict=True):
        assert_close(result, expected, plan.start, DIGITS)
    few = cohort(fine)[:3]  # also one after another, with little memory
    for result, plan, expected in zip(
        train(fine, few, memory=memory_for(fine, few, 3, 2), timesteps=2), few, truth, strict=False
    ):
        assert_close(result, expected, plan.start, DIGITS)


@pytest.mark.parametrize("trains", PARTS)
def test_fixed_factors_stay_and_get_no_noise(fine: Base, trains: str) -> None:
    between = random_bases(fine, 2, 3) if trains == "cores" else None
    start = between_bases(between, 7, fine) if between else nonzero_adapter(fine, 2, 7)
    plan = private(fine, "p", start=start, lora_xs_bases=between, trains=trains, noise_multiplier=5.0)
    assert plan.noise
    drawing = type(plan.noise).rounded_gaussian
    with patch.object(type(plan.noise), "rounded_gaussian", autospec=True, side_effect=drawing) as asked:
        result = trained_adapter(train(fine, [plan], memory=PLENTY, timesteps=2)[0])
    numbers = sum(part.numel() for part in trained_tensors(start, trains, between).values())
    assert {call.args[1] for call in asked.call_args_list} == {numbers}
    moved = trained_tensors(result, trains, between)
    assert all((moved[name] - was).norm() > 0.01 for name, was in trained_tensors(start, trains, between).items())
    for name, (a, b) in start.items():
        if trains != "a":
            assert torch.equal(result[name].a, a)
        if trains == "a":
            assert torch.equal(result[name].b, b)
        if between:
            assert (result[name].b - between[name].b @ moved[f"{name}.core"]).norm() < DIGITS


@pytest.mark.parametrize("trains", ["both", *PARTS])
def test_no_gradients_of_fixed_factors_and_other_sites(fine: Base, trains: str) -> None:
    """Observes the operation that applies adapters to a layer: no other gradient is requested, none at other sites."""
    between = at_some_sites(random_bases(fine, 2, 3)) if trains == "cores" else None
    start = between_bases(between, 7, fine) if between else at_some_sites(nonzero_adapter(fine, 2, 7))
    kept: list[tuple[bool, ...]] = []

    def watch(grad: Tensor, x: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept.append((x is not None, rest[3] is not None))
        return backward(grad, x, *rest)

    backward = batched_linear._backward
    with patch.object(batched_linear, "_backward", watch):
        train(
            fine,
            [job(fine, "p", start=start, lora_xs_bases=between, trains=trains, steps=1)],
            memory=PLENTY,
            timesteps=2,
        )
    expected = {"both": (True, True), "a": (True, False)}.get(trains, (False, True))
    assert set(kept) == {expected}
    assert len(kept) % len(start) == 0


def test_rows_hold_trained_factors_only(fine: Base) -> None:
    start = nonzero_adapter(fine, 3, 1)
    sizes = {name: sum(f.numel() for f in pair) for name, pair in start.items()}
    for plan, expected in (
        (job(fine, "p", start=start), sum(sizes.values())),
        (job(fine, "p", start=at_some_sites(start)), sum(sizes[name] for name in at_some_sites(start))),
        (
            job(fine, "p", start=at_some_sites(start), trains="b"),
            sum(start[name].b.numel() for name in at_some_sites(start)),
        ),
    ):
        shape = BufferSpec.of([plan])
        rows = CohortBuffers(fine, shape, 2)
        assert rows.adapters.shape == (2, expected)
        examples = row_bytes(fine, shape) - 8 * expected * fine.full_precision.itemsize
        assert 0 < examples < 20_000


def test_misshapen_bases_fail_their_own_job(fine: Base) -> None:
    between = random_bases(fine, 2, 3)
    start = between_bases(between, 7, fine)
    for wrong in (random_bases(fine, 3, 3), at_some_sites(between)):
        jobs = [job(fine, "wrong", start=start, lora_xs_bases=wrong, trains="cores"), job(fine, "sound")]
        result = train(fine, jobs, memory=PLENTY, timesteps=2)
        assert isinstance(result[0], ValueError)
        assert "LoRA-XS bases" in str(result[0])
        trained_adapter(result[1])
    with pytest.raises(ValueError, match="requires trains='cores'"):
        job(fine, "none", trains="cores")
    with pytest.raises(ValueError, match="requires trains='cores'"):
        job(fine, "not asked for", lora_xs_bases=between)
