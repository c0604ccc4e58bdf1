"""Training only cores between fixed factors, against merged weights and torch's AdamW on the cores themselves."""

from __future__ import annotations

from models.adapter import Adapter, Factors
from models.base import Base
from models.cores import cores
from tests.training.reference import PLENTY, Reference, assert_close, frame, job, live, private, room, trained
from training.jobs import Train
from training.trainer import train

DIGITS = 1e-10


def inside(given: Adapter, seed: int, base: Base) -> Adapter:
    """An adapter between these factors whose cores are not zero."""
    some = live(base, len(next(iter(given.values())).a), seed)
    return {name: Factors(a, left @ (left.T @ some[name].b)) for name, (a, left) in given.items()}


def cohort(base: Base) -> list[Train]:
    one, other = frame(base, 3, 1), frame(base, 2, 2)
    within, beside = inside(one, 5, base), inside(other, 6, base)
    return [
        job(base, "plain", start=within, frame=one, steps=10),
        job(base, "another frame", start=beside, frame=other, frozen=live(base, 2, 9)),
        job(base, "factors"),
        private(base, "private", start=within, frame=one, steps=10),
        private(base, "clipped site by site", start=beside, frame=other, per_site=True, batch_size=4),
        private(base, "nobody", start=within, frame=one, rate=0.0),
    ]


def test_cores_are_trained_as_if_alone(fine: Base) -> None:
    truth = [Reference(fine, plan).train() for plan in cohort(fine)]
    for memory in (PLENTY, room(fine, cohort(fine), 3, 2)):
        jobs = cohort(fine)
        for found, plan, wanted in zip(train(fine, jobs, memory=memory, timesteps=2), jobs, truth, strict=True):
            assert_close(found, wanted, plan.start, DIGITS)


def test_what_is_outside_the_frame_stays(fine: Base) -> None:
    between = frame(fine, 2, 3)
    plan = private(fine, "p", start=inside(between, 7, fine), frame=between, noise_multiplier=5.0)
    found = trained(train(fine, [plan], memory=PLENTY, timesteps=2)[0])
    moved = cores(found, between)
    for name, (a, left) in between.items():
        assert found[name].a is plan.start[name].a or (found[name].a == a).all()
        assert (found[name].b - left @ moved[f"{name}.core"]).norm() < DIGITS


def test_a_frame_that_does_not_fit_fails_alone(fine: Base) -> None:
    between = frame(fine, 2, 3)
    wrong = job(fine, "wrong", start=inside(between, 7, fine), frame=frame(fine, 3, 3))
    found = train(fine, [wrong, job(fine, "sound")], memory=PLENTY, timesteps=2)
    assert isinstance(found[0], ValueError)
    assert "frame" in str(found[0])
    trained(found[1])
