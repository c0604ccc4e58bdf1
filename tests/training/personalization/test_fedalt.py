"""FedAlt: the personal adapter is trained first, then the shared one on top of it."""

from __future__ import annotations

import pytest
import torch

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, init_adapter
from tests.helpers.devices import SITES, adapter
from tests.helpers.driven import drive, plain_job
from training.jobs import Job, Result, TrainedAdapter, TrainJob
from training.personalization import build
from training.personalization.fedalt import FedAlt

FIRST, SECOND = SITES


def moved(job: Job) -> Result:
    assert isinstance(job, TrainJob)
    return TrainedAdapter({n: Factors(f.a + 1, f.b + 2) for n, f in job.start.items()}, job.learning_rate, job.steps)


def product(parts: Adapter | None, name: str) -> torch.Tensor:
    assert parts is not None
    return parts[name].b @ parts[name].a


def train_jobs(done: list[Job]) -> list[TrainJob]:
    return [job for job in done if isinstance(job, TrainJob)]


def test_personal_part_is_trained_first() -> None:
    shared, tail, correction = adapter(3), adapter(1, seed=4), adapter(3, seed=5)
    job = plain_job(shared, frozen=tail, trains="b", optimizer="sgd", proximal=0.5, correction=correction)
    outcome, done = drive(FedAlt(rank=2, steps=7, lr=0.3).train_round(job, None), moved)
    personal, training = train_jobs(done)
    assert (personal.trains, personal.optimizer, personal.proximal, personal.correction) == ("both", "adamw", 0.0, None)
    assert (personal.steps, personal.learning_rate, personal.purpose) == (7, 0.3, "shared-personal")
    assert (training.trains, training.optimizer, training.proximal, training.steps) == ("b", "sgd", 0.5, 2)
    assert training.start is shared
    assert outcome.trained.loss == job.learning_rate
    for name in SITES:
        assert torch.equal(personal.start[name].a, shared[name].a[:2])
        assert not personal.start[name].b.any()
        torch.testing.assert_close(product(personal.frozen, name), product(shared, name) + product(tail, name))
        expected = product(tail, name) + torch.full_like(personal.start[name].b, 2.0) @ (shared[name].a[:2] + 1)
        torch.testing.assert_close(product(training.frozen, name), expected)
        torch.testing.assert_close(product(outcome.state, name), expected - product(tail, name))


def test_next_round_continues() -> None:
    """Sites that a round doesn't train keep their state, and are applied."""
    method, shared, state = FedAlt(rank=2), adapter(3), adapter(2, seed=8)
    job = plain_job({FIRST: shared[FIRST]}, frozen={SECOND: shared[SECOND]})
    outcome, done = drive(method.train_round(job, state), moved)
    personal, training = train_jobs(done)
    assert list(personal.start) == [FIRST]
    assert personal.start[FIRST] == state[FIRST]
    for one in (personal, training):
        expected = product(shared, SECOND) + product(state, SECOND)
        torch.testing.assert_close(product(one.frozen, SECOND), expected)
    assert outcome.state is not None
    assert outcome.state[SECOND] == state[SECOND]
    torch.testing.assert_close(outcome.state[FIRST].b, state[FIRST].b + 2)


def test_state_of_another_rank_is_not_used() -> None:
    job = plain_job(adapter(3))
    without, _ = drive(FedAlt(rank=2).train_round(job, None), moved)
    other, _ = drive(FedAlt(rank=2).train_round(job, init_adapter(SITES, 1, 3)), moved)
    assert without.state is not None
    assert other.state is not None
    for name in SITES:
        assert torch.equal(without.state[name].a, other.state[name].a)


def test_ranks_and_steps() -> None:
    method = FedAlt(rank=4, steps=6)
    assert (method.message_rank(2), method.trained_rank(2), method.personal_rank(9, 8)) == (2, 2, 4)
    assert (method.rank_in_round, method.steps_in_round(1)) == (4, 6)


@pytest.mark.parametrize("options", [{"rank": 0.0}, {"steps": 0.0}, {"lr": 0.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(AntherError, match=rf"^personalization\.{min(options)}="):
        build("fedalt", options)
