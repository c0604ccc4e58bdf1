"""In float64 a cohort is, to ten digits, what its clients are alone: any company, any order, any memory."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.base.base import Base
from models.lora.adapter import Adapter, Factors
from tests.helpers.reference_trainer import (
    PLENTY,
    Reference,
    assert_close,
    examples,
    job,
    live,
    private,
    room,
    some,
    trained,
)
from training.cohort import train
from training.jobs import Examples, Prior, TrainJob

DIGITS = 1e-10


def uneven(adapter: Adapter) -> Adapter:
    """Another rank at each site, 0 too."""
    return {
        name: Factors(f.a[: place % 4].clone(), f.b[:, : place % 4].clone())
        for place, (name, f) in enumerate(adapter.items())
    }


def cohort(base: Base) -> list[TrainJob]:
    """A new one each time: noise sources are used up."""
    frozen, prior = live(base, 2, 9), Prior(examples=examples(base, 3, 5), weight=0.5)
    return [
        job(base, "plain", steps=10),
        job(base, "higher rank, more in a batch than there are", rank=4, steps=10, count=3, batch_size=4),
        job(base, "some sites, frozen underneath", start=some(live(base, 3, 2)), frozen=frozen, learning_rate=3e-3),
        job(base, "uneven ranks, prior, views", start=uneven(live(base, 3, 4)), count=6, views=3, prior=prior, steps=3),
        job(base, "nothing to train", start={}, frozen=live(base, 1, 8), steps=2, batch_size=1),
        job(base, "no steps", steps=0),
        private(base, "one draw", draws=1, clip=0.035, steps=10, rank=3, frozen=frozen, batch_size=7),
        private(
            base, "prior", draws=3, clip=0.01, prior=prior, start=some(live(base, 2, 6)), count=3, learning_rate=1e-3
        ),
        private(base, "views", count=3, views=2, steps=10, frozen=some(frozen, 3)),
        private(base, "nobody", rate=0.0, rank=1, steps=10),
        private(base, "nothing clipped", clip=100.0, noise_multiplier=0.0, draws=1, steps=3),
        private(base, "nothing through", clip=0.0, noise_multiplier=0.0, steps=3),
    ]


@pytest.fixture(scope="module")
def truth(fine: Base) -> list[Adapter]:
    references = [Reference(fine, plan) for plan in cohort(fine)]
    adapters = [reference.train() for reference in references]
    shares = {reference.job.client: reference.share_clipped for reference in references if reference.scales}
    assert sum(0.1 < share < 0.9 for share in shares.values()) >= 3
    return adapters


def check(base: Base, places: list[int], memory: int, truth: list[Adapter]) -> None:
    jobs = [cohort(base)[place] for place in places]
    for found, plan, place in zip(train(base, jobs, memory=memory, timesteps=2), jobs, places, strict=True):
        assert_close(found, truth[place], plan.start, DIGITS)


def test_all_together(fine: Base, truth: list[Adapter]) -> None:
    check(fine, list(range(len(truth))), PLENTY, truth)


def test_one_at_a_time(fine: Base, truth: list[Adapter]) -> None:
    for place in range(len(truth)):
        check(fine, [place], PLENTY, truth)


@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_any_company_in_any_memory(fine: Base, truth: list[Adapter], data: st.DataObject) -> None:
    """From memory for one job and one entry, to memory for more than there is."""
    places = data.draw(st.lists(st.integers(0, len(truth) - 1), min_size=1, max_size=5, unique=True))
    jobs = [cohort(fine)[place] for place in places]
    memory = room(fine, jobs, data.draw(st.integers(1, 40)), residents=data.draw(st.integers(1, len(places))))
    check(fine, places, memory, truth)


def test_units_larger_than_a_pass(fine: Base) -> None:
    """Noise multiplicity 8 in memory for 3 entries, beside somebody whose units fit."""

    def jobs() -> list[TrainJob]:
        prior = Prior(examples=examples(fine, 2, 5), weight=2.0)
        return [
            private(fine, "many draws", draws=8, steps=2, count=3),
            private(fine, "few", draws=1, steps=2),
            private(fine, "and partners", draws=4, steps=2, count=3, prior=prior),
        ]

    truth = [Reference(fine, plan).train() for plan in jobs()]
    for memory in (room(fine, jobs(), 3), room(fine, jobs(), 1, residents=1), PLENTY):
        for found, want, plan in zip(train(fine, jobs(), memory=memory, timesteps=2), truth, jobs(), strict=True):
            assert_close(found, want, plan.start, DIGITS)


def test_each_site_to_its_share(fine: Base) -> None:
    """Per-site clipping beside flat, in one call."""

    def jobs() -> list[TrainJob]:
        return [
            private(fine, "per site", per_site=True, clip=0.02),
            private(fine, "flat"),
            private(fine, "some sites", per_site=True, clip=0.01, start=some(live(fine, 3, 2)), draws=1, steps=2),
            job(fine, "plain"),
        ]

    references = [Reference(fine, plan) for plan in jobs()]
    truth = [reference.train() for reference in references]
    for reference in references[:3]:
        assert 0.1 < reference.share_clipped < 0.9
    for memory in (room(fine, jobs()[::2], 2), PLENTY):
        for found, want, plan in zip(train(fine, jobs(), memory=memory, timesteps=2), truth, jobs(), strict=True):
            assert_close(found, want, plan.start, DIGITS)


def test_the_truth_tells_jobs_apart(fine: Base) -> None:
    """What is compared above differs with everything that a job may ask for."""
    prior = Prior(examples=examples(fine, 3, 5), weight=0.5)
    changes: list[dict[str, object]] = [
        {},
        {"per_site": True},
        {"clip": 1.0},
        {"noise_multiplier": 0.0},
        {"draws": 1},
        {"prior": prior},
        {"prior": Prior(examples=prior.examples, weight=0.4)},
        {"frozen": live(fine, 2, 9)},
        {"batch_size": 4},
        {"rate": 0.9},
    ]
    found = []
    for changed in changes:
        adapter = Reference(fine, private(fine, "a", steps=2, **changed)).train()
        found.append(torch.cat([factor.flatten() for factors in adapter.values() for factor in factors]))
    start = torch.cat([factor.flatten() for factors in live(fine, 2, 1).values() for factor in factors])
    for one, other in combinations(found, 2):
        assert float((one - other).norm()) > 1e-4 * float((one - start).norm())


def test_resolutions_share_a_call(fine: Base) -> None:
    def jobs() -> list[TrainJob]:
        small = examples(fine, 4, 3, side=4)
        return [
            job(fine, "large"),
            job(fine, "small", examples=small),
            private(fine, "private and small", count=4, examples=small),
            private(fine, "private and large"),
        ]

    for found, plan in zip(train(fine, jobs(), memory=room(fine, jobs()[::3], 5), timesteps=2), jobs(), strict=True):
        assert_close(found, Reference(fine, plan).train(), plan.start, DIGITS)


def test_contexts_of_other_lengths_share_a_call(fine: Base) -> None:
    latents, context = examples(fine, 5, 1)
    jobs = [job(fine, "long"), job(fine, "short", examples=Examples(latents, context[:, :3]))]
    for found, plan in zip(train(fine, jobs, memory=PLENTY, timesteps=2), jobs, strict=True):
        assert trained(found).keys() == plan.start.keys()
        assert_close(found, Reference(fine, plan).train(), plan.start, DIGITS)
