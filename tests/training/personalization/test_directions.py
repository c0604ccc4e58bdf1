"""The method of learned directions: its jobs, and the changes that a device sends."""

from __future__ import annotations

import pytest
import torch

from common.errors import AntherError
from models.lora.adapter import Adapter, Factors, init_adapter
from models.lora.directions import combine, divide
from tests.helpers.devices import SITES
from tests.helpers.driven import drive, plain_job
from training.jobs import Job, TrainedAdapter, TrainJob
from training.personalization import Personalization, build
from training.personalization.directions import LearnedDirections, split_examples

RANK, NUMBER = 2, 3


def start_adapter(method: LearnedDirections) -> Adapter:
    return method.initial(init_adapter(SITES, RANK, 1), seed=2)


def round_job(start: Adapter, pictures: int = 5, **changes: object) -> TrainJob:
    """A job of five pictures with settings that the method must keep for the shared adapter only."""
    return plain_job(start, pictures, **{"optimizer": "sgd", "proximal": 0.5, **changes})


COEFFICIENTS = torch.tensor([1.0, -2.0, 0.5])


def answer(job: Job) -> TrainedAdapter:
    """Fit the planted coefficients; add 1 to A and 2 to B otherwise."""
    assert isinstance(job, TrainJob)
    if job.directions is not None:
        adapter = {n: Factors(f.a, combine(job.directions[n], COEFFICIENTS)) for n, f in job.start.items()}
        return TrainedAdapter(adapter, 0.0, job.steps, coefficients=COEFFICIENTS)
    return TrainedAdapter({n: Factors(f.a + 1, f.b + 2) for n, f in job.start.items()}, 0.1, job.steps)


def test_round_sends_changes_of_all_three_parts() -> None:
    method = LearnedDirections(number=NUMBER)
    sent = start_adapter(method)
    outcome, done = drive(method.train_round(round_job(sent), None), answer)
    shared, directions = divide(sent, NUMBER)
    trained, moved = divide(outcome.trained.adapter, NUMBER)  # type: ignore[attr-defined]
    fit, step = done
    for name in SITES:
        torch.testing.assert_close(step.start[name].b, shared[name].b + combine(directions[name], COEFFICIENTS))
        torch.testing.assert_close(trained[name].a, shared[name].a + 1)
        torch.testing.assert_close(trained[name].b, shared[name].b + 2)
        change = COEFFICIENTS[:, None, None] * torch.full_like(shared[name].b, 2.0)
        torch.testing.assert_close(moved[name], directions[name] + change)
    assert (fit.trains, fit.optimizer, fit.proximal, fit.steps) == ("coefficients", "adamw", method.prior, 4)
    assert (step.trains, step.optimizer, step.proximal, step.steps) == ("both", "sgd", 0.5, 2)


def test_support_and_query_share_no_picture() -> None:
    method = LearnedDirections(number=NUMBER, support=0.6)
    _, (fit, step) = drive(method.train_round(round_job(start_adapter(method)), None), answer)
    first, second = (set(job.examples.latents.flatten().tolist()) for job in (fit, step))
    assert len(first) == 3
    assert first | second == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert not first & second


@pytest.mark.parametrize(("pictures", "expected"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (10, (9, 1))])
def test_both_parts_have_pictures(pictures: int, expected: tuple[int, int]) -> None:
    job = round_job(init_adapter(SITES, RANK, 1), pictures)
    assert tuple(map(len, split_examples(job, 0.95))) == expected


def test_split_differs_between_rounds() -> None:
    splits = [
        tuple(
            split_examples(round_job(init_adapter(SITES, RANK, 1), 8, round=number), 0.5)[0].latents.flatten().tolist()
        )
        for number in range(1, 6)
    ]
    assert len(set(splits)) > 1


def test_warm_up_trains_the_shared_adapter_only() -> None:
    method = LearnedDirections(number=NUMBER, warmup=3)
    sent = start_adapter(method)
    outcome, done = drive(method.train_round(round_job(sent), None), answer)
    trained, directions = divide(outcome.trained.adapter, NUMBER)  # type: ignore[attr-defined]
    assert len(done) == 1
    for name in SITES:
        assert torch.equal(directions[name], divide(sent, NUMBER)[1][name])
        torch.testing.assert_close(trained[name].b, divide(sent, NUMBER)[0][name].b + 2)


def test_sites_that_are_not_trained_are_frozen_without_directions() -> None:
    method = LearnedDirections(number=NUMBER)
    sent = start_adapter(method)
    shared, _ = divide(sent, NUMBER)
    trained, frozen = list(SITES)[:1], list(SITES)[1:]
    job = round_job({name: sent[name] for name in trained}, frozen={name: sent[name] for name in frozen})
    _, (fit, step) = drive(method.train_round(job, None), answer)
    assert isinstance(fit, TrainJob)
    assert isinstance(step, TrainJob)
    assert fit.frozen is not None
    assert step.frozen is not None
    assert set(fit.frozen) == set(SITES)
    assert set(step.frozen) == set(frozen)
    for name in frozen:
        for applied in (fit.frozen[name], step.frozen[name]):
            assert torch.equal(applied.a, shared[name].a)
            assert torch.equal(applied.b, shared[name].b)


def test_fit_adds_a_lora_to_the_coefficients() -> None:
    method = LearnedDirections(number=NUMBER, steps=7)
    sent = start_adapter(method)
    on_top = init_adapter(SITES, 1, 5)
    result, (fit, lora) = drive(method.fit(round_job(on_top, frozen=sent), sent, []), answer)
    shared, directions = divide(sent, NUMBER)
    assert (fit.steps, fit.learning_rate) == (7, method.lr)
    for name in SITES:
        assert lora.frozen is not None
        product = lora.frozen[name].b @ lora.frozen[name].a
        expected = (shared[name].b + combine(directions[name], COEFFICIENTS)) @ shared[name].a
        torch.testing.assert_close(product, expected)
        assert result[name].a.shape[0] == RANK + 1  # type: ignore[index]


def test_server_noise_on_rows_of_zeros_is_removed() -> None:
    method = LearnedDirections(number=NUMBER)
    noised = {n: Factors(f.a + 0.1, f.b + 0.1) for n, f in start_adapter(method).items()}
    for name, factors in method.cleaned(noised).items():
        assert torch.equal(factors.b, noised[name].b)
        assert torch.equal(factors.a[:RANK], noised[name].a[:RANK])
        assert not factors.a[RANK:].any()


def test_ranks() -> None:
    method = LearnedDirections(number=NUMBER)
    assert method.message_rank(RANK) == 8 == start_adapter(method)["up.to_k"].a.shape[0]
    assert method.trained_rank(8) == RANK


@pytest.mark.parametrize(
    "options",
    [
        {"number": 0.0},
        {"number": 1.5},
        {"steps": 0.0},
        {"round_steps": 0.0},
        {"warmup": -1.0},
        {"lr": 0.0},
        {"round_lr": float("inf")},
        {"scale": 0.0},
        {"prior": -1.0},
        {"support": 1.0},
        {"unknown": 1.0},
    ],
)
def test_wrong_options_are_one_line(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(AntherError, match=f"personalization.{name}") as error:
        build("directions", options)
    assert "\n" not in str(error.value)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(AntherError, match="nothing is registered"):
        build("os:system", {})


def test_default_is_the_plain_training() -> None:
    method = build("lora", {})
    assert isinstance(method, Personalization)
    job = round_job(init_adapter(SITES, RANK, 1))
    outcome, done = drive(method.train_round(job, None), answer)
    assert done == [job]
    assert outcome.state is None  # type: ignore[attr-defined]
