"""A device's answers to each request, and its refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data import MissingPicture, Pictures, fingerprint
from client.device import Device
from client.rounds.handler import handle
from client.rounds.helpers import cache_key, encode_split
from client.rounds.scheduler import run_handlers
from common.errors import AntherError
from models.lora.adapter import Factors, rank, split_rank
from privacy.ledger.ledger import RESERVED, SEALED, SENT
from privacy.noise import SimulatedNoise
from privacy.policy import Policy, RequestRefusedError
from protocol.messages import Evaluate, Evaluation, Personalize, Personalized, Query, Reply, Request, Train, Update
from tests.helpers.devices import (
    BASE,
    PICTURES,
    PRIVACY,
    SITES,
    Performer,
    adapter,
    from_bytes,
    make_device,
    picture,
    to_bytes,
    train_request,
)
from training import jobs
from training.jobs import Result

PERSONALIZE = Personalize(
    run="run",
    round=9,
    adapter=to_bytes(adapter(3)),
    rank=2,
    steps=10,
    batch_size=4,
    learning_rate=1e-3,
    look_every=5,
    patience=3,
)


def answer_request(request: Request, device: Device, perform: Performer | None = None) -> Reply:
    """Return the reply, or raise the exception."""
    outcome = run_handlers({"d": handle(request, device)}, perform or Performer())["d"]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def states(device: Device) -> list[str]:
    return [entry.state for entry in device.store.ledger.entries()]


def test_query_returns_report(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    assert answer_request(Query(), device) == device.report


def test_private_round(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = answer_request(train_request(), device, perform)
    assert isinstance(reply, Update)
    encode, train = perform.jobs
    assert isinstance(encode, jobs.EncodeJob)
    assert isinstance(train, jobs.TrainJob)
    assert (train.client, train.round, train.purpose, train.steps, train.batch_size) == ("d", 1, "shared", 5, 4)
    assert train.privacy == jobs.DPSGD(noise_multiplier=2.0, clip=0.01, sampling_rate=0.2, draws=1)
    assert train.noise is not None
    assert train.early_stopping is None
    assert rank(train.start) == 2
    assert reply.loss is None
    assert reply.release
    assert reply.epsilon == device.store.ledger.spent(1e-3).value > 0
    assert (reply.seconds, reply.joules, reply.quality) == (5.5, 10.0, "estimate")
    assert from_bytes(reply.adapter, 2)
    assert states(device) == [SEALED]
    reservation = device.store.ledger.entries()[0].reservation
    assert reservation.clip == 0.01
    assert reservation.data == fingerprint(PICTURES.train)
    assert reservation.adapter == hashlib.sha256(train_request().adapter).hexdigest()
    assert reply.events == device.store.ledger.history().events == 3  # enrolled, reserved, sealed


def test_encoding_depends_on_resolution(tmp_path: Path) -> None:
    device, pictures = make_device(tmp_path), PICTURES.train
    examples = jobs.Examples(torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 3))
    device.store.save_examples("train", cache_key(device, pictures), examples)
    assert not list(encode_split(device, "train", pictures))
    larger = dataclasses.replace(device, resolution=128)
    assert next(encode_split(larger, "train", pictures)) == jobs.EncodeJob(pictures=pictures)


def test_too_large_plan_is_refused_without_charge(tmp_path: Path) -> None:
    def check(rank: int, sites: Collection[str], _: int) -> None:
        raise RequestRefusedError(f"memory: not for rank {rank} at {len(sites)} sites")

    device, perform = make_device(tmp_path, check_memory=check), Performer()
    for request in (train_request(), PERSONALIZE):
        with pytest.raises(RequestRefusedError, match="memory: not for rank"):
            answer_request(request, device, perform)
    assert not perform.jobs
    assert states(device) == []


def test_round_without_privacy(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = answer_request(train_request(private=False), device, perform)
    assert isinstance(reply, Update)
    assert (reply.loss, reply.epsilon) == (0.25, None)
    train = perform.jobs[-1]
    assert isinstance(train, jobs.TrainJob)
    assert train.privacy is None
    assert train.noise is None
    assert device.store.ledger.spent(1e-3).value == math.inf
    assert reply.events == device.store.ledger.history().events == 2


def test_plan_selects_optimizer(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    request = train_request()
    answer_request(
        dataclasses.replace(request, plan=dataclasses.replace(request.plan, optimiser="sgd", proximal=0.5)),
        device,
        perform,
    )
    answer_request(train_request(number=2), device, perform)
    values = [(job.optimizer, job.proximal) for job in perform.jobs if isinstance(job, jobs.TrainJob)]
    assert values == [("sgd", 0.5), ("adamw", 0.0)]


def test_head_is_trained_and_tail_is_frozen(tmp_path: Path) -> None:
    perform, sent = Performer(), adapter(5)
    answer_request(train_request(rank=2, sent=to_bytes(sent)), make_device(tmp_path), perform)
    train = perform.jobs[-1]
    assert isinstance(train, jobs.TrainJob)
    assert train.frozen is not None
    for part, expected in zip((train.start, train.frozen), split_rank(sent, 2), strict=True):
        assert all(torch.equal(a, b) for name in SITES for a, b in zip(part[name], expected[name], strict=True))
    answer_request(train_request(number=2, rank=5, sent=to_bytes(sent)), make_device(tmp_path), perform)
    assert isinstance(perform.jobs[-1], jobs.TrainJob)
    assert perform.jobs[-1].frozen is None


def test_devices_of_one_process_share_adapter(tmp_path: Path) -> None:
    """One object is one slot in a pass, and one copy in memory."""
    perform, sent = Performer(), to_bytes(adapter(5))
    fleet = {name: make_device(tmp_path / name, name=name) for name in "abc"}
    for request in (
        train_request(private=False, sent=sent),
        Evaluate(run="run", round=1, adapter=bytes(bytearray(sent))),
    ):
        run_handlers({name: handle(request, device) for name, device in fleet.items()}, perform)
    trained = [job for job in perform.jobs if isinstance(job, jobs.TrainJob)]
    measured = [job.adapter for job in perform.jobs if isinstance(job, jobs.MeasureJob) and job.adapter]
    assert len(trained) == len(measured) == 3
    assert len({id(job.frozen) for job in trained}) == len({id(result) for result in measured}) == 1
    answer_request(train_request(number=2, private=False, sent=to_bytes(adapter(5, seed=1))), fleet["a"], perform)
    assert isinstance(perform.jobs[-1], jobs.TrainJob)
    assert perform.jobs[-1].frozen is not trained[0].frozen


def test_personal_adapter_stays_out_of_shared_job(tmp_path: Path) -> None:
    for private in (True, False):
        device, fresh = make_device(tmp_path / f"a{private}"), make_device(tmp_path / f"b{private}")
        answer_request(PERSONALIZE, device)
        with_personal, without = Performer(), Performer()
        answer_request(train_request(private=private), device, with_personal)
        answer_request(train_request(private=private), fresh, without)
        for first, second in zip(with_personal.jobs, without.jobs[1:], strict=True):  # the other device also encoded
            for part in ("start", "frozen"):
                one, other = getattr(first, part), getattr(second, part)
                assert (one is None) == (other is None)
                pairs = [zip(one[name], other[name], strict=True) for name in SITES]
                assert all(torch.equal(a, b) for pair in pairs for a, b in pair)


def test_simulated_noise_is_no_release(tmp_path: Path) -> None:
    for private in (True, False):
        noise = SimulatedNoise(seed=0, client="d", round=1, purpose="shared")
        device = make_device(tmp_path / str(private), noise=noise)
        reply = answer_request(train_request(private=private), device)
        assert isinstance(reply, Update)
        assert not reply.release
        assert not device.store.ledger.entries()[0].reservation.release


def test_repeated_request_gets_same_bytes(tmp_path: Path) -> None:
    perform = Performer()
    first = answer_request(train_request(), make_device(tmp_path), perform)
    before = len(perform.jobs)
    assert answer_request(train_request(sent=to_bytes(adapter(4))), make_device(tmp_path), perform) == first
    assert len(perform.jobs) == before


def test_pictures_are_encoded_once_until_they_change(tmp_path: Path) -> None:
    perform = Performer()
    for number in (1, 2):
        answer_request(train_request(number=number), make_device(tmp_path), perform)
    assert sum(isinstance(job, jobs.EncodeJob) for job in perform.jobs) == 1
    other = Pictures((picture(99), *PICTURES.train[1:]), PICTURES.validation, PICTURES.test)
    answer_request(train_request(number=3), make_device(tmp_path, pictures=other), perform)
    assert sum(isinstance(job, jobs.EncodeJob) for job in perform.jobs) == 2


def test_later_round_settles_earlier_rounds(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    for number in (1, 2):
        answer_request(train_request(number=number), device)
    assert states(device) == [SENT, SEALED]
    with pytest.raises(RequestRefusedError, match="can't be sent again"):
        answer_request(train_request(number=1), device)


@pytest.mark.parametrize(
    "change", [{"update": "int9"}, {"keep": 0.0}, {"trains": "c"}, {"optimiser": "adam"}, {"proximal": -1.0}], ids=str
)
def test_unanswerable_plan_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """The round would fail after training, each time it is requested, with other noise and without a further charge."""
    device, perform, request = make_device(tmp_path), Performer(), train_request()
    plan = dataclasses.replace(request.plan, **change)  # type: ignore[arg-type]
    with pytest.raises(RequestRefusedError, match=f"{next(iter(change))}=.*: no device supports this"):
        answer_request(dataclasses.replace(request, plan=plan), device, perform)
    assert (perform.jobs, states(device)) == ([], [])


def test_infinite_epsilon_trains_nothing(tmp_path: Path) -> None:
    device, perform, request = make_device(tmp_path), Performer(), train_request()
    plan = dataclasses.replace(request.plan, privacy=dataclasses.replace(PRIVACY, delta=1e-13))
    for _ in range(2):
        with pytest.raises(RequestRefusedError, match=r"privacy\.delta=1e-13: .* no finite ε"):
            answer_request(dataclasses.replace(request, plan=plan), device, perform)
    assert not any(isinstance(job, jobs.TrainJob) for job in perform.jobs)


@pytest.mark.parametrize("damaged", [False, True])
def test_refused_request_reads_no_picture(tmp_path: Path, damaged: bool) -> None:
    """The refusal must not reveal whether there are pictures, or whether one is damaged."""
    answer_request(train_request(), make_device(tmp_path))

    def pictures() -> Pictures:
        if damaged:
            raise AntherError("cat.jpg: is no picture")
        return Pictures((), (), ())

    device = dataclasses.replace(make_device(tmp_path), pictures=pictures)
    for request in (train_request(number=2, private=False), Evaluate(run="run", round=2, adapter=to_bytes(adapter(3)))):
        with pytest.raises(RequestRefusedError, match="nothing without it since"):
            answer_request(request, device)


def test_failed_training_is_retried_under_its_reservation(tmp_path: Path) -> None:
    device = make_device(tmp_path)

    def fail(batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        return [MemoryError("too big") if isinstance(job, jobs.TrainJob) else Performer()([job])[0] for job in batch]

    assert isinstance(run_handlers({0: handle(train_request(), device)}, fail)[0], MemoryError)
    assert states(device) == [RESERVED]
    spent = device.store.ledger.spent(1e-3)
    answer_request(train_request(), device)
    assert states(device) == [SEALED]
    assert device.store.ledger.spent(1e-3) == spent


def test_reserved_round_continues_with_other_pictures(tmp_path: Path) -> None:
    """The server can't distinguish this from a retry with the same pictures; the ledger records those actually used."""

    def crash(batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        return [MemoryError() if isinstance(job, jobs.TrainJob) else Performer()([job])[0] for job in batch]

    other = PICTURES._replace(train=(*PICTURES.train, picture(99)))
    replies = {}
    for name, pictures in (("same", PICTURES), ("other", other)):
        run_handlers({0: handle(train_request(), make_device(tmp_path / name))}, crash)
        device, perform = make_device(tmp_path / name, pictures=pictures), Performer()
        replies[name] = answer_request(train_request(), device, perform)
        trained = perform.jobs[-1]
        assert isinstance(trained, jobs.TrainJob)
        assert len(trained.examples) == len(pictures.train)
        (entry,) = device.store.ledger.entries()
        assert (entry.state, entry.reservation.data) == (SEALED, fingerprint(pictures.train))
    without = [dataclasses.replace(reply, adapter=b"") for reply in replies.values() if isinstance(reply, Update)]
    assert len(without) == 2
    assert without[0] == without[1]


def test_pictures_may_change_between_rounds(tmp_path: Path) -> None:
    for number in range(1, 4):
        pictures = PICTURES._replace(train=(*PICTURES.train[number:], picture(99)))
        assert isinstance(
            answer_request(train_request(number=number), make_device(tmp_path, pictures=pictures)), Update
        )
    assert len({entry.reservation.data for entry in make_device(tmp_path).store.ledger.entries()}) == 3


def test_rolled_back_device_refuses_without_charge(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    first = answer_request(train_request(), device)
    assert isinstance(first, Update)
    for echo in (0, first.events):
        assert answer_request(dataclasses.replace(train_request(), echo=echo), device) == first
    for number in (1, 2):
        with pytest.raises(RequestRefusedError, match="rolled back"):
            answer_request(dataclasses.replace(train_request(number=number), echo=first.events + 1), device, perform)
    assert not perform.jobs
    assert states(device) == [SEALED]


@pytest.mark.parametrize(
    "change",
    [
        {"base": "another"},
        {"rank": 4},
        {"steps": 10**6},
        {"privacy": dataclasses.replace(PRIVACY, noise_multiplier=0.0)},
    ],
)
def test_invalid_plan_is_refused_without_charge(tmp_path: Path, change: dict[str, object]) -> None:
    device, perform, request = make_device(tmp_path), Performer(), train_request()
    plan = dataclasses.replace(request.plan, **change)  # type: ignore[arg-type]
    with pytest.raises(RequestRefusedError):
        answer_request(dataclasses.replace(request, plan=plan), device, perform)
    assert not perform.jobs
    assert not states(device)


def test_round_has_one_plan(tmp_path: Path) -> None:
    device, request = make_device(tmp_path), train_request()
    answer_request(request, device)
    with pytest.raises(RequestRefusedError, match="another plan"):
        answer_request(dataclasses.replace(request, plan=dataclasses.replace(request.plan, steps=6)), device)


def test_owner_budget_ends_run(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path, policy=Policy(max_epsilon=1.0, delta=1e-3)), Performer()
    outcomes = [run_handlers({0: handle(train_request(number=number), device)}, perform)[0] for number in range(8)]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, RequestRefusedError)]
    done = len(outcomes) - len(refusals)
    assert 1 < done < 8
    assert all("allows 1" in str(refusal) for refusal in refusals)
    assert len(states(device)) == done
    assert sum(isinstance(job, jobs.TrainJob) for job in perform.jobs) == done
    assert device.store.ledger.spent(1e-3).value <= 1.0


def test_device_with_budget_requires_noise(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path, policy=Policy(max_epsilon=1.0)), Performer()
    for request in (train_request(private=False), Evaluate(run="run", round=1, adapter=to_bytes(adapter(3)))):
        with pytest.raises(RequestRefusedError):
            answer_request(request, device, perform)
    assert not perform.jobs
    assert not states(device)
    assert isinstance(answer_request(PERSONALIZE, device), Personalized)  # it stays on the device


LARGE = {name: Factors(f.a, 1000.0 * f.b) for name, f in adapter(3).items()}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "too short"),
        (b"\x08" + bytes(20), "not JSON"),
        (to_bytes(adapter(3))[:-1], "declares"),
        (to_bytes({"x": adapter(1)["up.to_k"]}), "missing"),
        (to_bytes({name: Factors(f.a * torch.nan, f.b) for name, f in adapter(3).items()}), "NaN"),
        (to_bytes(LARGE), "norm .* is over 100"),
        (to_bytes(adapter(2000)), "bytes, the maximum is"),
    ],
)
def test_malformed_adapter_is_refused_without_charge(tmp_path: Path, sent: bytes, reason: str) -> None:
    device, perform = make_device(tmp_path), Performer()
    personalise = dataclasses.replace(PERSONALIZE, adapter=sent)
    for request in (train_request(sent=sent), Evaluate(run="run", round=1, adapter=sent), personalise):
        with pytest.raises(RequestRefusedError, match=reason):
            answer_request(request, device, perform)
    assert not perform.jobs
    assert not states(device)


def test_adapter_of_forbidden_rank(tmp_path: Path) -> None:
    with pytest.raises(RequestRefusedError, match=r"not one of rank 1 to 2 .* holds 3"):
        answer_request(train_request(), make_device(tmp_path, policy=Policy(max_rank=2)))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(bases=("a" * 64,)), "base bbbbbbbbbbbb"),
        (Policy(sites="up.*"), "site down.to_q"),
        (Policy(max_clip=0.001), "clip"),
        (Policy(min_noise_multiplier=2.5), "noise_multiplier"),
        (Policy(max_steps=4), "steps"),
        (Policy(max_batch=3), "examples per step"),
        (Policy(max_rank=1), "rank"),
    ],
)
def test_forbidden_plan_is_refused_before_reading(tmp_path: Path, policy: Policy, words: str) -> None:
    perform = Performer()

    def read() -> Pictures:
        raise AssertionError("the pictures were read")

    device = dataclasses.replace(make_device(tmp_path, policy=policy), pictures=read)
    with pytest.raises(RequestRefusedError, match=words):
        answer_request(dataclasses.replace(train_request(), adapter=b"never decoded"), device, perform)
    assert not perform.jobs
    assert not states(device)


def test_minimum_of_pictures(tmp_path: Path) -> None:
    """Without privacy, the refusal's text is the same for every number, and nothing is done or charged."""
    messages, open_ = set(), train_request(private=False)
    for count in range(1, 4):
        pictures = PICTURES._replace(train=PICTURES.train[:count])
        device, perform = (
            make_device(tmp_path / str(count), pictures=pictures, policy=Policy(min_pictures=4)),
            Performer(),
        )
        with pytest.raises(RequestRefusedError) as raised:
            answer_request(open_, device, perform)
        messages.add(str(raised.value))
        assert not perform.jobs
        assert not states(device)
    assert len(messages) == 1
    answer_request(open_, make_device(tmp_path, policy=Policy(min_pictures=4)))


def private_job(device: Device, request: Train = train_request()) -> jobs.TrainJob:  # noqa: B008 - frozen
    """Return the private training job of a round that is answered and charged."""
    perform = Performer()
    assert isinstance(answer_request(request, device, perform), Update)
    assert states(device) == [SEALED]
    job = perform.jobs[-1]
    assert isinstance(job, jobs.TrainJob)
    return job


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_pictures_give_only_noise(tmp_path: Path, count: int) -> None:
    """The reply contains only noise, though the round is answered and charged like any other."""
    pictures = PICTURES._replace(train=PICTURES.train[:count])
    job = private_job(make_device(tmp_path, pictures=pictures, policy=Policy(min_pictures=4)))
    assert (job.pictures, job.names) == (0, ())
    assert job.assumed_pictures == 20


def unreadable_picture(number: int) -> jobs.Picture:
    """Return a picture that can be identified but not decoded."""

    class UnreadablePicture(jobs.Picture):
        def at_least(self, side: int) -> np.ndarray:  # noqa: ARG002
            raise OSError(f"broken {number}")

    return UnreadablePicture(np.full((9, 8, 3), number, np.uint8), f"broken {number}")


class DecodingPerformer(Performer):
    """Decodes pictures, as an encoder does."""

    def _perform(self, job: jobs.Job) -> jobs.Result:
        if isinstance(job, jobs.EncodeJob):
            for picture in job.pictures:
                picture.at_least(64)
        return super()._perform(job)

    def __call__(self, batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        try:
            return list(super().__call__(batch))
        except OSError as error:
            return [error] * len(batch)


def test_unusable_pictures_count_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For any cause, each picture separately; the owner's log names it."""
    mixed = (PICTURES.train[0], MissingPicture(), unreadable_picture(1), PICTURES.train[1])
    device, perform = make_device(tmp_path, pictures=PICTURES._replace(train=mixed)), DecodingPerformer()
    assert isinstance(answer_request(train_request(), device, perform), Update)
    job = perform.jobs[-1]
    assert isinstance(job, jobs.TrainJob)
    assert job.names == tuple(fingerprint([PICTURES.train[index]]) for index in (0, 1))
    assert len(job.examples) == 2
    assert "broken 1" in caplog.text


def test_private_round_without_pictures_is_only_noise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Pictures:
        raise AntherError("photos: no such folder")

    for number, read in enumerate((missing, lambda: Pictures((), (), ()))):
        device = dataclasses.replace(make_device(tmp_path / str(number)), pictures=read)
        assert private_job(device).pictures == 0
    assert "photos: no such folder" in caplog.text


def test_pictures_beyond_assumed_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A missing picture keeps its position, so no other moves up: neighbors differ by one position's picture."""
    assert PRIVACY.sampling_rate == 0.2
    request = train_request()
    request = dataclasses.replace(
        request, plan=dataclasses.replace(request.plan, batch_size=1)
    )  # assumes five pictures
    whole = tuple(map(picture, range(8)))
    job = private_job(make_device(tmp_path / "whole", pictures=PICTURES._replace(train=whole)), request)
    assert job.names == tuple(fingerprint([one]) for one in whole[:5])
    assert "of 8 pictures (train) only the first 5" in caplog.text
    without = (*whole[:2], MissingPicture(), *whole[3:])
    job = private_job(make_device(tmp_path / "without", pictures=PICTURES._replace(train=without)), request)
    assert job.names == tuple(fingerprint([whole[index]]) for index in (0, 1, 3, 4))


def test_private_reply_waits_for_public_time(tmp_path: Path) -> None:
    """The wait comes after the seal, so a device that is stopped while waiting has nothing to repeat."""
    waited: list[tuple[float, list[str]]] = []

    class Early(Performer):
        def _perform(self, job: jobs.Job) -> jobs.Result:
            result = super()._perform(job)
            return result._replace(idle=12.5) if isinstance(result, jobs.TrainedAdapter) else result

    device = make_device(tmp_path)
    device = dataclasses.replace(device, wait=lambda seconds: waited.append((seconds, states(device))))
    first = answer_request(train_request(), device, Early())
    assert waited == [(12.5, [SEALED])]
    assert answer_request(train_request(), device) == first
    assert len(waited) == 1


def test_private_reply_waits_on_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("client.rounds.train.save_round_state", full)
    device = dataclasses.replace(make_device(tmp_path), wait=waited.append)
    with pytest.raises(OSError, match="no space"):
        answer_request(train_request(), device)
    assert (len(waited), states(device)) == (1, [SEALED])


@pytest.mark.parametrize("policy", [Policy(bases=("a" * 64,)), Policy(sites="up.*"), Policy(max_rank=1)])
def test_policy_applies_to_personal_adapter(tmp_path: Path, policy: Policy) -> None:
    perform = Performer()
    with pytest.raises(RequestRefusedError):
        answer_request(PERSONALIZE, make_device(tmp_path, policy=policy), perform)
    assert not perform.jobs


def test_unusable_pictures_cost_nothing_without_privacy(tmp_path: Path) -> None:
    def missing() -> Pictures:
        raise AntherError("photos: no such folder")

    device = dataclasses.replace(make_device(tmp_path), pictures=missing)
    with pytest.raises(AntherError, match="photos"):
        answer_request(train_request(private=False), device)
    assert not states(device)


def test_evaluation_measures_base_once_per_run(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    for number in (1, 2):
        request = Evaluate(run="run", round=number, adapter=to_bytes(adapter(3)))
        assert answer_request(request, device, perform) == Evaluation(device="d", round=number, base=0.75, shared=0.5)
    measured = [job for job in perform.jobs if isinstance(job, jobs.MeasureJob)]
    assert [job.adapter is None for job in measured] == [True, False, False]
    assert all(len(job.examples) == len(PICTURES.validation) for job in measured)


def test_evaluation_needs_validation_pictures(tmp_path: Path) -> None:
    device = make_device(tmp_path, pictures=PICTURES._replace(validation=()))
    with pytest.raises(RequestRefusedError, match="validation"):
        answer_request(Evaluate(run="run", round=1, adapter=to_bytes(adapter(3))), device)


def last_train(perform: Performer) -> jobs.TrainJob:
    return [job for job in perform.jobs if isinstance(job, jobs.TrainJob)][-1]


def test_personalizing(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = answer_request(PERSONALIZE, device, perform)
    assert reply == Personalized(device="d", seconds=4.0, joules=20.0, quality="estimate")
    train = last_train(perform)
    assert train.early_stopping is not None
    assert (train.early_stopping.every, train.early_stopping.patience) == (5, 3)
    assert len(train.early_stopping.validation) == len(PICTURES.validation)
    for name in SITES:  # same directions as the shared adapter, and no change yet
        assert torch.equal(train.start[name].a, adapter(3)[name].a[:2])
        assert train.start[name].b.eq(0).all()
    stored = device.store.personal(SITES)
    assert stored is not None
    assert stored.base == BASE
    assert all(torch.equal(stored.shared[name].b, adapter(3)[name].b) for name in SITES)
    assert not states(device)  # nothing left the device


def test_personalizing_continues_on_same_shared_adapter(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    answer_request(PERSONALIZE, device)
    stored = device.store.personal(SITES)
    assert stored is not None
    answer_request(dataclasses.replace(PERSONALIZE, round=10), device, perform)
    assert torch.equal(last_train(perform).start["up.to_k"].b, stored.adapter["up.to_k"].b)
    changes = ({"adapter": to_bytes(adapter(3, seed=1))}, {"adapter": to_bytes(adapter(4))}, {"rank": 1})
    for number, change in enumerate(changes, start=11):
        answer_request(dataclasses.replace(PERSONALIZE, round=number, **change), device, perform)
        assert last_train(perform).start["up.to_k"].b.eq(0).all()


def test_repeated_personalizing_is_done_once(tmp_path: Path) -> None:
    device, repeated = make_device(tmp_path), Performer()
    first = answer_request(PERSONALIZE, device)
    assert answer_request(PERSONALIZE, device, repeated) == first
    assert repeated.jobs == []


def test_personalizing_without_validation_takes_every_step(tmp_path: Path) -> None:
    perform = Performer()
    answer_request(PERSONALIZE, make_device(tmp_path, pictures=PICTURES._replace(validation=())), perform)
    assert last_train(perform).early_stopping is None


@pytest.mark.parametrize("change", [{"rank": 0}, {"steps": 10**6}, {"look_every": 0}, {"patience": 0}])
def test_impossible_personalizing_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(RequestRefusedError):
        answer_request(dataclasses.replace(PERSONALIZE, **change), make_device(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_loss_is_an_error(tmp_path: Path, loss: float) -> None:
    class Overflows(Performer):
        def _perform(self, job: jobs.Job) -> Result:
            return loss if isinstance(job, jobs.MeasureJob) else super()._perform(job)

    request = Evaluate(run="run", round=1, adapter=to_bytes(adapter(2)))
    with pytest.raises(AntherError, match=f"base is {loss}"):
        answer_request(request, make_device(tmp_path), Overflows())
