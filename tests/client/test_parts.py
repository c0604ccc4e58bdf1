"""Plans for one factor or some sites: trained, frozen, uploaded and stored parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from client.device import Device
from client.rounds.handler import handle
from client.rounds.local_factors import with_local_factors
from client.rounds.scheduler import run_handlers
from client.store.store import LOCAL_FACTORS, RESIDUAL
from models.lora.adapter import Adapter, Factors, split_rank
from models.lora.trainable import trained_shapes, trained_tensors
from privacy.noise import SimulatedNoise
from privacy.policy import RequestRefusedError
from protocol import tensor_codec
from protocol.messages import Evaluate, EvaluationPrivacy, Personalize, Train, Update
from tests.helpers.devices import SITES, Performer, adapter, cache_epsilon, make_device, to_bytes, train_request
from training import jobs
from training.jobs import Result, TrainedAdapter

FIRST, *OTHERS = SITES
SENT = adapter(3)


class Shifted(Performer):
    """Shifts every factor by its round's number, so that training is repeatable."""

    def _perform(self, job: jobs.Job) -> Result:
        if not isinstance(job, jobs.TrainJob):
            return super()._perform(job)
        step = 0.01 * job.round
        return TrainedAdapter(
            {name: Factors(a + step, b - step) for name, (a, b) in job.start.items()}, 0.25, job.steps
        )


@pytest.fixture(autouse=True, scope="module")
def _epsilon_is_known() -> None:
    cache_epsilon(3)


def request(number: int = 1, *, rank: int = 2, private: bool = False, **changes: Any) -> Train:
    requested = train_request(number=number, rank=rank, private=private, sent=to_bytes(SENT))
    return dataclasses.replace(requested, plan=dataclasses.replace(requested.plan, **changes))


def answer_request(device: Device, request_: Any, perform: Performer | None = None) -> Any:
    reply = run_handlers({"d": handle(request_, device)}, perform or Shifted())["d"]
    if isinstance(reply, Exception):
        raise reply
    return reply


def trained(perform: Performer) -> jobs.TrainJob:
    (job,) = (job for job in perform.jobs if isinstance(job, jobs.TrainJob))
    return job


def equal(one: Adapter, other: Adapter) -> bool:
    same = (torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
    return one.keys() == other.keys() and all(same)


@pytest.mark.parametrize("private", [False, True], ids=["open", "private"])
@pytest.mark.parametrize("rank", [2, 3])
def test_plan_sites_are_trained_others_frozen(tmp_path: Path, private: bool, rank: int) -> None:
    perform = Shifted()
    reply = answer_request(make_device(tmp_path), request(rank=rank, private=private, sites=(FIRST,)), perform)
    job, (head, tail) = trained(perform), split_rank(SENT, rank)
    assert equal(job.start, {FIRST: head[FIRST]})
    assert job.frozen is not None
    beside = {name: SENT[name] for name in OTHERS}
    assert equal(job.frozen, beside | ({FIRST: tail[FIRST]} if rank < 3 else {}))
    expected = trained_shapes({FIRST: SITES[FIRST]}, rank, "both")
    assert tensor_codec.decode(reply.adapter, expected).keys() == expected.keys()


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ((FIRST, "mid.nowhere"), "the plan trains site mid.nowhere, which this base does not have"),
        ((), "the plan names 0 sites"),
        ((FIRST, FIRST), "the plan names 2 sites to train, 1 of them different"),
    ],
)
def test_invalid_sites_are_refused_without_charge(tmp_path: Path, sites: Any, words: str) -> None:
    device, perform = make_device(tmp_path), Performer()
    with pytest.raises(RequestRefusedError, match=words):
        answer_request(device, request(private=True, sites=sites), perform)
    assert not perform.jobs
    assert not device.store.ledger.entries()


def test_memory_check_uses_plan_sites(tmp_path: Path) -> None:
    requested: list[tuple[int, list[str]]] = []
    device = make_device(tmp_path, check_memory=lambda rank, sites, _: requested.append((rank, list(sites))))
    answer_request(device, request(1, sites=(FIRST,)))
    answer_request(device, request(2))
    assert requested == [(2, [FIRST]), (2, list(SITES))]


@pytest.mark.parametrize("trains", ["a", "b"])
def test_only_trained_factor_is_uploaded(tmp_path: Path, trains: str) -> None:
    perform = Shifted()
    reply = answer_request(make_device(tmp_path), request(trains=trains), perform)
    assert trained(perform).trains == trains
    decoded = tensor_codec.decode(reply.adapter, trained_shapes(SITES, 2, trains))
    assert all(name.endswith(f"lora_{trains.upper()}") for name in decoded)
    assert not (tmp_path / LOCAL_FACTORS).exists()


@pytest.mark.parametrize("changes", [{"sites": (FIRST,)}, {"trains": "b"}])
def test_residual_belongs_to_same_trained_part(tmp_path: Path, changes: Any) -> None:
    device, separate = make_device(tmp_path / "1"), make_device(tmp_path / "2")
    small = {"update": "int4", "feedback": True}
    answer_request(device, request(1, **small))
    assert (tmp_path / "1" / RESIDUAL).exists()
    assert (
        answer_request(device, request(2, **small, **changes)).adapter
        == answer_request(separate, request(2, **small, **changes)).adapter
    )


def own_b(job: jobs.TrainJob) -> dict[str, torch.Tensor]:
    return {name: factors.b for name, factors in job.start.items()}


def split(number: int = 1, **changes: Any) -> Train:
    return request(number, rank=3, trains="split", **changes)


def round_of(device: Device, request_: Train) -> tuple[jobs.TrainJob, Update]:
    perform = Shifted()
    reply = answer_request(device, request_, perform)
    return trained(perform), reply


def after(job: jobs.TrainJob) -> Adapter:
    result = Shifted()._perform(job)
    assert isinstance(result, TrainedAdapter)
    return result.adapter


@pytest.mark.parametrize("private", [False, True], ids=["open", "private"])
def test_a_is_uploaded_and_b_stays(tmp_path: Path, private: bool) -> None:
    """FedSA-LoRA: the next round starts with the received A and the device's own B."""
    device = make_device(tmp_path)
    first, reply = round_of(device, split(1, private=private))
    assert first.trains == "both"
    assert equal(first.start, SENT)
    up = tensor_codec.decode(reply.adapter, trained_shapes(SITES, 3, "split"))
    assert all(torch.equal(up[name], part) for name, part in trained_tensors(after(first), "a", None).items())
    second, _ = round_of(device, split(2, private=private))
    assert all(torch.equal(b, after(first)[name].b) for name, b in own_b(second).items())
    assert all(torch.equal(second.start[name].a, SENT[name].a) for name in SITES)


def test_repeated_round_starts_the_same(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer_request(device, split(1))
    first, reply = round_of(device, split(2))
    repeated, same = round_of(make_device(tmp_path), split(2))
    assert equal(first.start, repeated.start)
    assert reply.adapter == same.adapter


def test_b_belongs_to_run_and_guarantee(tmp_path: Path) -> None:
    """A B protected by simulated noise never enters a round with real noise."""
    simulated = SimulatedNoise(seed=0, client="d", round=1, purpose="shared")
    answer_request(make_device(tmp_path / "1", noise=simulated), split(1, private=True))
    job, _ = round_of(make_device(tmp_path / "1"), split(2, private=True))
    assert equal(job.start, SENT)
    device = make_device(tmp_path / "2")
    answer_request(device, split(1))
    job, _ = round_of(device, split(2, run="another"))
    assert equal(job.start, SENT)


def test_partial_plan_uses_device_b_at_all_sites(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    first, _ = round_of(device, split(1))
    job, _ = round_of(device, split(2, sites=(FIRST,)))
    assert torch.equal(job.start[FIRST].b, after(first)[FIRST].b)
    assert job.frozen is not None
    assert all(torch.equal(job.frozen[name].b, after(first)[name].b) for name in OTHERS)
    third, _ = round_of(device, split(3))
    expected = after(first) | after(job)
    assert all(torch.equal(b, expected[name].b) for name, b in own_b(third).items())


def test_evaluation_and_personalizing_use_own_b(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    first, _ = round_of(device, split(1))
    perform = Shifted()
    answer_request(device, Evaluate(run="run", round=1, adapter=to_bytes(SENT)), perform)
    personalise = Personalize(
        run="run",
        round=1,
        adapter=to_bytes(SENT),
        rank=2,
        steps=3,
        batch_size=2,
        learning_rate=1e-3,
        look_every=1,
        patience=1,
    )
    answer_request(device, personalise, perform)
    measured = [job.adapter for job in perform.jobs if isinstance(job, jobs.MeasureJob) and job.adapter]
    frozen = [job.frozen for job in perform.jobs if isinstance(job, jobs.TrainJob) and job.frozen]
    stored = device.store.personal(SITES)
    assert stored is not None
    for result in (*measured, *frozen, stored.shared):  # some with a personal adapter in addition
        assert all(torch.equal(result[name].b[:, :3], after(first)[name].b) for name in SITES)
        assert all(torch.equal(result[name].a[:3], SENT[name].a) for name in SITES)


@pytest.mark.parametrize("release", [True, False])
def test_noised_gain_uses_b_of_same_guarantee(tmp_path: Path, release: bool) -> None:
    noise = None if release else SimulatedNoise(seed=0, client="d", round=1, purpose="shared")
    answer_request(make_device(tmp_path, noise=noise), split(1, private=True))
    device, perform = make_device(tmp_path), Shifted()
    stored = with_local_factors(SENT, "run", device)
    assert not equal(stored, SENT)
    hidden = EvaluationPrivacy(noise_multiplier=20.0, clip=0.2, pictures=3, delta=1e-3)
    answer_request(device, Evaluate(run="run", round=1, adapter=to_bytes(SENT), privacy=hidden), perform)
    (measured,) = [job.adapter for job in perform.jobs if isinstance(job, jobs.MeasureEachJob) and job.adapter]
    assert equal(measured, stored if release else SENT)


def test_damaged_b_is_ignored(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    answer_request(device, split(1))
    (tmp_path / LOCAL_FACTORS).write_bytes(b"nonsense")
    job, _ = round_of(device, split(2))
    assert equal(job.start, SENT)
