"""In float64, a cohort agrees with the reference trainer to ten digits: for any jobs, in any order, in any memory."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.base.base import Base
from models.lora.adapter import Adapter, Factors
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    at_some_sites,
    examples,
    job,
    memory_for,
    nonzero_adapter,
    private,
    trained_adapter,
)
from training.cohort import train
from training.jobs import Examples, Prior, TrainJob
from training.variants import Variants

pytestmark = pytest.mark.integration

DIGITS = 1e-10


def with_mixed_ranks(adapter: Adapter) -> Adapter:
    """Return the adapter with a different rank at each site, including 0."""
    return {
        name: Factors(f.a[: index % 4].clone(), f.b[:, : index % 4].clone())
        for index, (name, f) in enumerate(adapter.items())
    }


def weights(count: int) -> Tensor:
    """Return weights of latent positions with a mean of 1 for each example; some are 0."""
    levels = (torch.rand(count, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3).clamp(min=0)
    return levels / levels.mean((1, 2), keepdim=True)


def cohort(base: Base) -> list[TrainJob]:
    """Create new jobs in each call, since noise sources are used up."""
    frozen, prior = nonzero_adapter(base, 2, 9), Prior(examples=examples(base, 3, 5), weight=0.5)
    return [
        job(base, "plain", steps=4),
        job(base, "higher rank, more in a batch than there are", rank=4, steps=4, count=3, batch_size=4),
        job(
            base,
            "some sites, frozen underneath",
            start=at_some_sites(nonzero_adapter(base, 3, 2)),
            frozen=frozen,
            learning_rate=3e-3,
        ),
        job(
            base,
            "uneven ranks, prior, views",
            start=with_mixed_ranks(nonzero_adapter(base, 3, 4)),
            count=6,
            views=3,
            prior=prior,
            steps=3,
        ),
        job(base, "nothing to train", start={}, frozen=nonzero_adapter(base, 1, 8), steps=2, batch_size=1),
        job(base, "no steps", steps=0),
        job(
            base,
            "captions, masks, prior",
            count=7,
            variants=Variants(captioned=(3, 2), without=1, dropout=0.3),
            loss_weights=weights(7),
            prior=prior,
            steps=4,
        ),
        private(base, "one draw", draws=1, clip=0.035, steps=4, rank=3, frozen=frozen, batch_size=7),
        private(
            base,
            "prior",
            draws=3,
            clip=0.01,
            prior=prior,
            start=at_some_sites(nonzero_adapter(base, 2, 6)),
            count=3,
            learning_rate=1e-3,
        ),
        private(base, "views", count=3, views=2, steps=4, frozen=at_some_sites(frozen, 3)),
        private(base, "nobody", rate=0.0, rank=1, steps=4),
        private(base, "nothing clipped", clip=100.0, noise_multiplier=0.0, draws=1, steps=3),
        private(base, "nothing through", clip=0.0, noise_multiplier=0.0, steps=3),
    ]


@pytest.fixture(scope="module")
def reference_results(fine: Base) -> list[Adapter]:
    references = [Reference(fine, plan) for plan in cohort(fine)]
    adapters = [reference.train() for reference in references]
    shares = {reference.job.client: reference.share_clipped for reference in references if reference.scales}
    assert sum(0.1 < share < 0.9 for share in shares.values()) >= 3
    return adapters


def check(base: Base, places: list[int], memory: int, reference_results: list[Adapter]) -> None:
    jobs = [cohort(base)[index] for index in places]
    for result, plan, index in zip(train(base, jobs, memory=memory, timesteps=2), jobs, places, strict=True):
        assert_close(result, reference_results[index], plan.start, DIGITS)


def test_all_jobs_together(fine: Base, reference_results: list[Adapter]) -> None:
    check(fine, list(range(len(reference_results))), PLENTY, reference_results)


def test_one_job_at_a_time(fine: Base, reference_results: list[Adapter]) -> None:
    for index in range(len(reference_results)):
        check(fine, [index], PLENTY, reference_results)


@given(data=st.data())
@settings(max_examples=4)  # an example trains up to five clients
def test_any_jobs_in_any_memory(fine: Base, reference_results: list[Adapter], data: st.DataObject) -> None:
    """From memory for one job and one entry to more than enough."""
    places = data.draw(st.lists(st.integers(0, len(reference_results) - 1), min_size=1, max_size=5, unique=True))
    jobs = [cohort(fine)[index] for index in places]
    memory = memory_for(fine, jobs, data.draw(st.integers(1, 40)), residents=data.draw(st.integers(1, len(places))))
    check(fine, places, memory, reference_results)


def test_units_larger_than_a_pass(fine: Base) -> None:
    """Noise multiplicity 8 in memory for 3 entries, next to a job whose units fit."""

    def jobs() -> list[TrainJob]:
        prior = Prior(examples=examples(fine, 2, 5), weight=2.0)
        return [
            private(fine, "many draws", draws=8, steps=2, count=3),
            private(fine, "few", draws=1, steps=2),
            private(fine, "and partners", draws=4, steps=2, count=3, prior=prior),
        ]

    reference_results = [Reference(fine, plan).train() for plan in jobs()]
    for memory in (memory_for(fine, jobs(), 3), memory_for(fine, jobs(), 1, residents=1), PLENTY):
        for result, want, plan in zip(
            train(fine, jobs(), memory=memory, timesteps=2), reference_results, jobs(), strict=True
        ):
            assert_close(result, want, plan.start, DIGITS)


def test_per_site_clipping(fine: Base) -> None:
    """Per-site and flat clipping in one call."""

    def jobs() -> list[TrainJob]:
        return [
            private(fine, "per site", per_site=True, clip=0.02),
            private(fine, "flat"),
            private(
                fine,
                "some sites",
                per_site=True,
                clip=0.01,
                start=at_some_sites(nonzero_adapter(fine, 3, 2)),
                draws=1,
                steps=2,
            ),
            job(fine, "plain"),
        ]

    references = [Reference(fine, plan) for plan in jobs()]
    reference_results = [reference.train() for reference in references]
    for reference in references[:3]:
        assert 0.1 < reference.share_clipped < 0.9
    for memory in (memory_for(fine, jobs()[::2], 2), PLENTY):
        for result, want, plan in zip(
            train(fine, jobs(), memory=memory, timesteps=2), reference_results, jobs(), strict=True
        ):
            assert_close(result, want, plan.start, DIGITS)


def test_reference_distinguishes_jobs(fine: Base) -> None:
    """The reference results differ with every setting of a job."""
    prior = Prior(examples=examples(fine, 3, 5), weight=0.5)
    changes: list[dict[str, object]] = [
        {},
        {"per_site": True},
        {"clip": 1.0},
        {"noise_multiplier": 0.0},
        {"draws": 1},
        {"prior": prior},
        {"prior": Prior(examples=prior.examples, weight=0.4)},
        {"frozen": nonzero_adapter(fine, 2, 9)},
        {"batch_size": 4},
        {"rate": 0.9},
    ]
    result = []
    for changed in changes:
        adapter = Reference(fine, private(fine, "a", steps=2, **changed)).train()
        result.append(torch.cat([factor.flatten() for factors in adapter.values() for factor in factors]))
    start = torch.cat([factor.flatten() for factors in nonzero_adapter(fine, 2, 1).values() for factor in factors])
    for one, other in combinations(result, 2):
        assert float((one - other).norm()) > 1e-4 * float((one - start).norm())


def test_mixed_resolutions_in_one_call(fine: Base) -> None:
    def jobs() -> list[TrainJob]:
        small = examples(fine, 4, 3, side=4)
        return [
            job(fine, "large"),
            job(fine, "small", examples=small),
            private(fine, "private and small", count=4, examples=small),
            private(fine, "private and large"),
        ]

    for result, plan in zip(
        train(fine, jobs(), memory=memory_for(fine, jobs()[::3], 5), timesteps=2), jobs(), strict=True
    ):
        assert_close(result, Reference(fine, plan).train(), plan.start, DIGITS)


def test_mixed_context_lengths_in_one_call(fine: Base) -> None:
    latents, context = examples(fine, 5, 1)
    jobs = [job(fine, "long"), job(fine, "short", examples=Examples(latents, context[:, :3]))]
    for result, plan in zip(train(fine, jobs, memory=PLENTY, timesteps=2), jobs, strict=True):
        assert trained_adapter(result).keys() == plan.start.keys()
        assert_close(result, Reference(fine, plan).train(), plan.start, DIGITS)
