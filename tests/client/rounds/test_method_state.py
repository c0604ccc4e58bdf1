"""State of a method of personalization: it stays on the device from round to round, and out of private rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.device import Device
from client.rounds.handler import handle
from client.rounds.method_state import state_after_rounds, state_before_round
from client.rounds.scheduler import run_handlers
from client.store.layout import METHOD_STATE
from models.lora.adapter import Adapter, Factors
from privacy.policy import Policy, RequestRefusedError
from protocol.messages import MethodOption, PersonalizationMethod, Personalize, Train
from tests.helpers.devices import SITES, Performer, adapter, make_device, to_bytes, train_request
from training.jobs import Job, Result, TrainedAdapter, TrainJob

FEDALT = PersonalizationMethod(name="fedalt", options=(MethodOption(name="rank", value=1.0),))


class Steady(Performer):
    """Adds 1 to every trained number."""

    def _perform(self, job: Job) -> Result:
        if isinstance(job, TrainJob):
            return TrainedAdapter({n: Factors(f.a + 1, f.b + 1) for n, f in job.start.items()}, 0.25, job.steps)
        return super()._perform(job)


def request(number: int, *, private: bool = False, method: PersonalizationMethod = FEDALT, **changes: Any) -> Train:
    plain = train_request(number=number, private=private)
    return replace(plain, plan=replace(plain.plan, personalization=method, **changes))


def answer(device: Device, sent: Any) -> tuple[Any, list[TrainJob]]:
    """Return the reply, and the training jobs."""
    perform = Steady()
    reply = run_handlers({"d": handle(sent, device)}, perform)["d"]
    return reply, [job for job in perform.jobs if isinstance(job, TrainJob)]


def equal(one: Adapter | None, other: Adapter | None) -> bool:
    assert one is not None
    assert other is not None
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


def test_round_continues_the_personal_adapter(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    _, (first, _) = answer(device, request(1))
    _, (second, _) = answer(device, request(2))
    assert all(torch.equal(second.start[n].b, first.start[n].b + 1) for n in SITES)


def test_repeated_round_gives_same_reply(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer(device, request(1))
    one, (first, _) = answer(device, request(2))
    other, (again, _) = answer(device, request(2))
    assert one == other
    assert equal(first.start, again.start)
    other, (again, _) = answer(device, request(2))  # repeated twice
    assert one == other


@pytest.mark.parametrize(
    "other",
    [
        {"run": "other"},
        {"method": PersonalizationMethod(name="fedalt", options=(MethodOption(name="rank", value=2.0),))},
    ],
)
def test_state_belongs_to_run_and_options(other: dict[str, Any], tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer(device, request(1))
    _, (personal, _) = answer(device, request(2, **other))
    assert not any(f.b.any() for f in personal.start.values())


def test_state_belongs_to_base(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer(device, request(1))
    other = replace(device, report=replace(device.report, base="c" * 64))
    assert state_after_rounds("run", FEDALT, device) is not None
    assert state_after_rounds("run", FEDALT, other) is None


def test_damaged_state_counts_as_missing(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer(device, request(1))
    (tmp_path / METHOD_STATE).write_bytes(b"nonsense")
    _, (personal, _) = answer(device, request(2))
    assert not any(f.b.any() for f in personal.start.values())


def test_state_of_other_sites_counts_as_missing(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer(device, request(1))
    for sites in ({}, {name: site._replace(inputs=9) for name, site in SITES.items()}):
        assert state_after_rounds("run", FEDALT, replace(device, sites=sites)) is None


@pytest.mark.parametrize("policy", [None, Policy(delta=1e-3, max_epsilon=50.0)])
def test_private_round_refuses_the_method(policy: Policy | None, tmp_path: Path) -> None:
    """No job runs, and no state is read or written."""
    device = make_device(tmp_path, policy=policy)
    reply, done = answer(device, request(1, private=True))
    assert isinstance(reply, RequestRefusedError)
    assert str(reply) == "personalization=fedalt: its personal part of a round would enter it without noise"
    assert not done
    assert not (tmp_path / METHOD_STATE).exists()
    assert state_before_round(request(1, private=True).plan, device) is None


def test_private_round_does_not_read_the_state(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer(device, request(1))
    assert state_before_round(request(2).plan, device) is not None
    assert state_before_round(request(2, private=True).plan, device) is None
    reply, done = answer(device, request(2, private=True))
    assert isinstance(reply, RequestRefusedError)
    assert not done


def personalize(rank: int = 3) -> Personalize:
    return Personalize(
        run="run",
        round=3,
        adapter=to_bytes(adapter(3)),
        rank=rank,
        steps=4,
        batch_size=2,
        learning_rate=1e-3,
        look_every=1,
        patience=1,
        method=FEDALT,
    )


@pytest.mark.parametrize("rounds", [0, 1])
def test_personalization_continues_from_the_rounds(rounds: int, tmp_path: Path) -> None:
    """Without rounds, as for a newcomer, it starts like a LoRA on top, of the method's rank."""
    device = make_device(tmp_path)
    for number in range(1, rounds + 1):
        answer(device, request(number))
    _, (job,) = answer(device, personalize())
    kept = state_after_rounds("run", FEDALT, device)
    assert (kept is None) == (rounds == 0)
    if kept:
        assert equal(job.start, kept)
    assert all(f.a.shape[0] == 1 for f in job.start.values())


def test_memory_is_checked_for_the_larger_adapter(tmp_path: Path) -> None:
    """The two adapters are trained one after the other. The shared one may be the smaller one."""
    checked: list[int] = []
    device = make_device(tmp_path, check_memory=lambda rank, *_: checked.append(rank))
    for number, rank in enumerate((1.0, 5.0), start=1):
        method = PersonalizationMethod(name="fedalt", options=(MethodOption(name="rank", value=rank),))
        reply, done = answer(device, request(number, method=method))
        assert reply.rank == 2
        assert [len(job.start["up.to_k"].a) for job in done] == [rank, 2]
    assert checked == [2, 5]


def test_owner_limits_the_rank(tmp_path: Path) -> None:
    device = make_device(tmp_path, policy=Policy(delta=1e-3, max_rank=3))
    method = PersonalizationMethod(name="fedalt", options=(MethodOption(name="rank", value=4.0),))
    for sent in (request(1, method=method), replace(personalize(), method=method)):
        reply, done = answer(device, sent)
        assert str(reply) == "rank=4: this device allows 1 to 3"
        assert not done
