"""What a device does with each request, and what it refuses."""

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


def ask(request: Request, device: Device, perform: Performer | None = None) -> Reply:
    """The reply, or the exception raised."""
    outcome = run_handlers({"d": handle(request, device)}, perform or Performer())["d"]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def states(device: Device) -> list[str]:
    return [entry.state for entry in device.store.ledger.entries()]


def test_a_query_is_answered_with_the_report(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    assert ask(Query(), device) == device.report


def test_a_private_round(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = ask(train_request(), device, perform)
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
    made = device.store.ledger.entries()[0].reservation
    assert made.clip == 0.01
    assert made.data == fingerprint(PICTURES.train)
    assert made.adapter == hashlib.sha256(train_request().adapter).hexdigest()
    assert reply.events == device.store.ledger.history().events == 3  # enrolled, reserved, sealed


def test_pictures_are_encoded_anew_at_another_resolution(tmp_path: Path) -> None:
    device, pictures = make_device(tmp_path), PICTURES.train
    examples = jobs.Examples(torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 3))
    device.store.save_examples("train", cache_key(device, pictures), examples)
    assert not list(encode_split(device, "train", pictures))
    larger = dataclasses.replace(device, resolution=128)
    assert next(encode_split(larger, "train", pictures)) == jobs.EncodeJob(pictures=pictures)


def test_what_does_not_fit_is_refused_before_it_is_charged(tmp_path: Path) -> None:
    def check(rank: int, sites: Collection[str]) -> None:
        raise RequestRefusedError(f"memory: not for rank {rank} at {len(sites)} sites")

    device, perform = make_device(tmp_path, check_memory=check), Performer()
    for request in (train_request(), PERSONALIZE):
        with pytest.raises(RequestRefusedError, match="memory: not for rank"):
            ask(request, device, perform)
    assert not perform.jobs
    assert states(device) == []


def test_a_round_without_privacy(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = ask(train_request(private=False), device, perform)
    assert isinstance(reply, Update)
    assert (reply.loss, reply.epsilon) == (0.25, None)
    train = perform.jobs[-1]
    assert isinstance(train, jobs.TrainJob)
    assert train.privacy is None
    assert train.noise is None
    assert device.store.ledger.spent(1e-3).value == math.inf
    assert reply.events == device.store.ledger.history().events == 2


def test_a_plan_says_how_steps_are_taken(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    request = train_request()
    ask(
        dataclasses.replace(request, plan=dataclasses.replace(request.plan, optimiser="sgd", proximal=0.5)),
        device,
        perform,
    )
    ask(train_request(number=2), device, perform)
    found = [(job.optimizer, job.proximal) for job in perform.jobs if isinstance(job, jobs.TrainJob)]
    assert found == [("sgd", 0.5), ("adamw", 0.0)]


def test_the_head_is_trained_and_the_tail_stays_beside_it(tmp_path: Path) -> None:
    perform, sent = Performer(), adapter(5)
    ask(train_request(rank=2, sent=to_bytes(sent)), make_device(tmp_path), perform)
    train = perform.jobs[-1]
    assert isinstance(train, jobs.TrainJob)
    assert train.frozen is not None
    for part, expected in zip((train.start, train.frozen), split_rank(sent, 2), strict=True):
        assert all(torch.equal(a, b) for name in SITES for a, b in zip(part[name], expected[name], strict=True))
    ask(train_request(number=2, rank=5, sent=to_bytes(sent)), make_device(tmp_path), perform)
    assert isinstance(perform.jobs[-1], jobs.TrainJob)
    assert perform.jobs[-1].frozen is None


def test_devices_of_one_process_share_what_they_were_sent(tmp_path: Path) -> None:
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
    assert len({id(job.frozen) for job in trained}) == len({id(found) for found in measured}) == 1
    ask(train_request(number=2, private=False, sent=to_bytes(adapter(5, seed=1))), fleet["a"], perform)
    assert isinstance(perform.jobs[-1], jobs.TrainJob)
    assert perform.jobs[-1].frozen is not trained[0].frozen


def test_the_personal_adapter_never_enters_the_shared_job(tmp_path: Path) -> None:
    for private in (True, False):
        device, fresh = make_device(tmp_path / f"a{private}"), make_device(tmp_path / f"b{private}")
        ask(PERSONALIZE, device)
        with_personal, without = Performer(), Performer()
        ask(train_request(private=private), device, with_personal)
        ask(train_request(private=private), fresh, without)
        for one, other in zip(with_personal.jobs, without.jobs[1:], strict=True):  # the other one had to encode
            for part in ("start", "frozen"):
                pairs = [zip(getattr(one, part)[name], getattr(other, part)[name], strict=True) for name in SITES]
                assert all(torch.equal(a, b) for pair in pairs for a, b in pair)


def test_simulated_noise_is_no_release(tmp_path: Path) -> None:
    for private in (True, False):
        noise = SimulatedNoise(seed=0, client="d", round=1, purpose="shared")
        device = make_device(tmp_path / str(private), noise=noise)
        reply = ask(train_request(private=private), device)
        assert isinstance(reply, Update)
        assert not reply.release
        assert not device.store.ledger.entries()[0].reservation.release


def test_the_same_request_gets_the_same_bytes_and_no_second_training(tmp_path: Path) -> None:
    perform = Performer()
    first = ask(train_request(), make_device(tmp_path), perform)
    before = len(perform.jobs)
    assert ask(train_request(sent=to_bytes(adapter(4))), make_device(tmp_path), perform) == first
    assert len(perform.jobs) == before


def test_pictures_are_encoded_once_until_they_change(tmp_path: Path) -> None:
    perform = Performer()
    for number in (1, 2):
        ask(train_request(number=number), make_device(tmp_path), perform)
    assert sum(isinstance(job, jobs.EncodeJob) for job in perform.jobs) == 1
    other = Pictures((picture(99), *PICTURES.train[1:]), PICTURES.validation, PICTURES.test)
    ask(train_request(number=3), make_device(tmp_path, pictures=other), perform)
    assert sum(isinstance(job, jobs.EncodeJob) for job in perform.jobs) == 2


def test_a_later_round_settles_the_earlier_ones_of_its_run(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    for number in (1, 2):
        ask(train_request(number=number), device)
    assert states(device) == [SENT, SEALED]
    with pytest.raises(RequestRefusedError, match="can't be sent again"):
        ask(train_request(number=1), device)


@pytest.mark.parametrize(
    "change", [{"update": "int9"}, {"keep": 0.0}, {"trains": "c"}, {"optimiser": "adam"}, {"proximal": -1.0}], ids=str
)
def test_a_plan_that_could_not_be_answered_is_refused_before_anything(
    tmp_path: Path, change: dict[str, object]
) -> None:
    """It would fail after training, each time that it is asked for, with other noise and at no further charge."""
    device, perform, request = make_device(tmp_path), Performer(), train_request()
    plan = dataclasses.replace(request.plan, **change)  # type: ignore[arg-type]
    with pytest.raises(RequestRefusedError, match=f"{next(iter(change))}=.*: no device supports this"):
        ask(dataclasses.replace(request, plan=plan), device, perform)
    assert (perform.jobs, states(device)) == ([], [])


def test_a_delta_at_which_no_epsilon_can_be_told_trains_nothing(tmp_path: Path) -> None:
    device, perform, request = make_device(tmp_path), Performer(), train_request()
    plan = dataclasses.replace(request.plan, privacy=dataclasses.replace(PRIVACY, delta=1e-13))
    for _ in range(2):
        with pytest.raises(RequestRefusedError, match=r"privacy\.delta=1e-13: .* no finite ε"):
            ask(dataclasses.replace(request, plan=plan), device, perform)
    assert not any(isinstance(job, jobs.TrainJob) for job in perform.jobs)


@pytest.mark.parametrize("damaged", [False, True])
def test_after_a_promise_an_open_request_looks_at_no_picture(tmp_path: Path, damaged: bool) -> None:
    """Which no it is must not tell whether there are pictures, nor that one is damaged."""
    ask(train_request(), make_device(tmp_path))

    def pictures() -> Pictures:
        if damaged:
            raise AntherError("cat.jpg: is no picture")
        return Pictures((), (), ())

    device = dataclasses.replace(make_device(tmp_path), pictures=pictures)
    for request in (train_request(number=2, private=False), Evaluate(run="run", round=2, adapter=to_bytes(adapter(3)))):
        with pytest.raises(RequestRefusedError, match="nothing without it since"):
            ask(request, device)


def test_a_failed_training_stays_charged_and_is_retried_under_its_reservation(tmp_path: Path) -> None:
    device = make_device(tmp_path)

    def fail(batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        return [MemoryError("too big") if isinstance(job, jobs.TrainJob) else Performer()([job])[0] for job in batch]

    assert isinstance(run_handlers({0: handle(train_request(), device)}, fail)[0], MemoryError)
    assert states(device) == [RESERVED]
    spent = device.store.ledger.spent(1e-3)
    ask(train_request(), device)
    assert states(device) == [SEALED]
    assert device.store.ledger.spent(1e-3) == spent


def test_a_reserved_round_goes_on_with_other_pictures_as_if_nothing_were(tmp_path: Path) -> None:
    """The server can't tell it from a retry on the same ones; the ledger says what the reply was made from."""

    def crash(batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        return [MemoryError() if isinstance(job, jobs.TrainJob) else Performer()([job])[0] for job in batch]

    other = PICTURES._replace(train=(*PICTURES.train, picture(99)))
    replies = {}
    for name, pictures in (("same", PICTURES), ("other", other)):
        run_handlers({0: handle(train_request(), make_device(tmp_path / name))}, crash)
        device, perform = make_device(tmp_path / name, pictures=pictures), Performer()
        replies[name] = ask(train_request(), device, perform)
        trained = perform.jobs[-1]
        assert isinstance(trained, jobs.TrainJob)
        assert len(trained.examples) == len(pictures.train)
        (entry,) = device.store.ledger.entries()
        assert (entry.state, entry.reservation.data) == (SEALED, fingerprint(pictures.train))
    without = [dataclasses.replace(reply, adapter=b"") for reply in replies.values() if isinstance(reply, Update)]
    assert len(without) == 2
    assert without[0] == without[1]


def test_pictures_may_come_and_go_between_rounds(tmp_path: Path) -> None:
    for number in range(1, 4):
        pictures = PICTURES._replace(train=(*PICTURES.train[number:], picture(99)))
        assert isinstance(ask(train_request(number=number), make_device(tmp_path, pictures=pictures)), Update)
    assert len({entry.reservation.data for entry in make_device(tmp_path).store.ledger.entries()}) == 3


def test_a_device_that_was_rolled_back_refuses_before_it_is_charged(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    first = ask(train_request(), device)
    assert isinstance(first, Update)
    for echo in (0, first.events):
        assert ask(dataclasses.replace(train_request(), echo=echo), device) == first
    for number in (1, 2):
        with pytest.raises(RequestRefusedError, match="rolled back"):
            ask(dataclasses.replace(train_request(number=number), echo=first.events + 1), device, perform)
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
def test_a_plan_that_does_not_fit_is_refused_at_no_charge(tmp_path: Path, change: dict[str, object]) -> None:
    device, perform, request = make_device(tmp_path), Performer(), train_request()
    plan = dataclasses.replace(request.plan, **change)  # type: ignore[arg-type]
    with pytest.raises(RequestRefusedError):
        ask(dataclasses.replace(request, plan=plan), device, perform)
    assert not perform.jobs
    assert not states(device)


def test_a_round_is_trained_by_one_plan(tmp_path: Path) -> None:
    device, request = make_device(tmp_path), train_request()
    ask(request, device)
    with pytest.raises(RequestRefusedError, match="another plan"):
        ask(dataclasses.replace(request, plan=dataclasses.replace(request.plan, steps=6)), device)


def test_the_owners_cap_ends_the_run(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path, policy=Policy(max_epsilon=1.0, delta=1e-3)), Performer()
    outcomes = [run_handlers({0: handle(train_request(number=number), device)}, perform)[0] for number in range(8)]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, RequestRefusedError)]
    done = len(outcomes) - len(refusals)
    assert 1 < done < 8
    assert all("allows 1" in str(refusal) for refusal in refusals)
    assert len(states(device)) == done
    assert sum(isinstance(job, jobs.TrainJob) for job in perform.jobs) == done
    assert device.store.ledger.spent(1e-3).value <= 1.0


def test_a_device_with_a_cap_shares_nothing_without_noise(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path, policy=Policy(max_epsilon=1.0)), Performer()
    for request in (train_request(private=False), Evaluate(run="run", round=1, adapter=to_bytes(adapter(3)))):
        with pytest.raises(RequestRefusedError):
            ask(request, device, perform)
    assert not perform.jobs
    assert not states(device)
    assert isinstance(ask(PERSONALIZE, device), Personalized)  # what stays on the device is nobody's business


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
def test_a_malformed_adapter_is_refused_at_no_charge(tmp_path: Path, sent: bytes, reason: str) -> None:
    device, perform = make_device(tmp_path), Performer()
    personalise = dataclasses.replace(PERSONALIZE, adapter=sent)
    for request in (train_request(sent=sent), Evaluate(run="run", round=1, adapter=sent), personalise):
        with pytest.raises(RequestRefusedError, match=reason):
            ask(request, device, perform)
    assert not perform.jobs
    assert not states(device)


def test_an_adapter_of_a_rank_that_the_owner_forbids(tmp_path: Path) -> None:
    with pytest.raises(RequestRefusedError, match=r"not one of rank 1 to 2 .* holds 3"):
        ask(train_request(), make_device(tmp_path, policy=Policy(max_rank=2)))


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
def test_what_the_owner_forbids_is_refused_before_anything_is_read(tmp_path: Path, policy: Policy, words: str) -> None:
    perform = Performer()

    def read() -> Pictures:
        raise AssertionError("the pictures were read")

    device = dataclasses.replace(make_device(tmp_path, policy=policy), pictures=read)
    with pytest.raises(RequestRefusedError, match=words):
        ask(dataclasses.replace(train_request(), adapter=b"never decoded"), device, perform)
    assert not perform.jobs
    assert not states(device)


def test_the_owners_minimum_of_pictures(tmp_path: Path) -> None:
    """Without privacy it is refused in the same words for every number, before anything is done or charged."""
    said, open_ = set(), train_request(private=False)
    for count in range(1, 4):
        pictures = PICTURES._replace(train=PICTURES.train[:count])
        device, perform = (
            make_device(tmp_path / str(count), pictures=pictures, policy=Policy(min_pictures=4)),
            Performer(),
        )
        with pytest.raises(RequestRefusedError) as raised:
            ask(open_, device, perform)
        said.add(str(raised.value))
        assert not perform.jobs
        assert not states(device)
    assert len(said) == 1
    ask(open_, make_device(tmp_path, policy=Policy(min_pictures=4)))


def trained_on(device: Device, request: Train = train_request()) -> jobs.TrainJob:  # noqa: B008 - frozen
    """The one private job of a round that is answered and charged."""
    perform = Performer()
    assert isinstance(ask(request, device, perform), Update)
    assert states(device) == [SEALED]
    job = perform.jobs[-1]
    assert isinstance(job, jobs.TrainJob)
    return job


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_pictures_for_the_owner_are_not_told_in_private(tmp_path: Path, count: int) -> None:
    """Noise alone: none of them enters, though the round is answered and charged like any other."""
    pictures = PICTURES._replace(train=PICTURES.train[:count])
    job = trained_on(make_device(tmp_path, pictures=pictures, policy=Policy(min_pictures=4)))
    assert (job.pictures, job.names) == (0, ())
    assert job.assumed_pictures == 20


def broken(number: int) -> jobs.Picture:
    """A picture that can be told from others and not be read."""

    class Broken(jobs.Picture):
        def at_least(self, side: int) -> np.ndarray:  # noqa: ARG002
            raise OSError(f"broken {number}")

    return Broken(np.full((9, 8, 3), number, np.uint8), f"broken {number}")


class Reader(Performer):
    """Reads pictures, as an encoder does."""

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


def test_pictures_that_cannot_be_used_count_as_absent_in_private(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever keeps them from being used, one by one; the owner's log says which."""
    mixed = (PICTURES.train[0], MissingPicture(), broken(1), PICTURES.train[1])
    device, perform = make_device(tmp_path, pictures=PICTURES._replace(train=mixed)), Reader()
    assert isinstance(ask(train_request(), device, perform), Update)
    job = perform.jobs[-1]
    assert isinstance(job, jobs.TrainJob)
    assert job.names == tuple(fingerprint([PICTURES.train[place]]) for place in (0, 1))
    assert len(job.examples) == 2
    assert "broken 1" in caplog.text


def test_a_private_round_without_any_pictures_is_noise_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Pictures:
        raise AntherError("photos: no such folder")

    for number, read in enumerate((missing, lambda: Pictures((), (), ()))):
        device = dataclasses.replace(make_device(tmp_path / str(number)), pictures=read)
        assert trained_on(device).pictures == 0
    assert "photos: no such folder" in caplog.text


def test_more_pictures_than_assumed_leave_the_last_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An absent one keeps its place, so that none moves up: a neighbor is a place without its picture."""
    assert PRIVACY.sampling_rate == 0.2
    request = train_request()
    request = dataclasses.replace(request, plan=dataclasses.replace(request.plan, batch_size=1))  # of five
    whole = tuple(map(picture, range(8)))
    job = trained_on(make_device(tmp_path / "whole", pictures=PICTURES._replace(train=whole)), request)
    assert job.names == tuple(fingerprint([one]) for one in whole[:5])
    assert "of 8 pictures (train) only the first 5" in caplog.text
    without = (*whole[:2], MissingPicture(), *whole[3:])
    job = trained_on(make_device(tmp_path / "without", pictures=PICTURES._replace(train=without)), request)
    assert job.names == tuple(fingerprint([whole[place]]) for place in (0, 1, 3, 4))


def test_a_private_reply_waits_for_its_time(tmp_path: Path) -> None:
    """Once it is sealed: a device that is stopped while it waits has nothing to do again."""
    waited: list[tuple[float, list[str]]] = []

    class Early(Performer):
        def _perform(self, job: jobs.Job) -> jobs.Result:
            found = super()._perform(job)
            return found._replace(idle=12.5) if isinstance(found, jobs.TrainedAdapter) else found

    device = make_device(tmp_path)
    device = dataclasses.replace(device, wait=lambda seconds: waited.append((seconds, states(device))))
    first = ask(train_request(), device, Early())
    assert waited == [(12.5, [SEALED])]
    assert ask(train_request(), device) == first
    assert len(waited) == 1


def test_a_private_reply_waits_also_where_the_device_cannot_keep_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("client.rounds.train.save_round_state", full)
    device = dataclasses.replace(make_device(tmp_path), wait=waited.append)
    with pytest.raises(OSError, match="no space"):
        ask(train_request(), device)
    assert (len(waited), states(device)) == (1, [SEALED])


@pytest.mark.parametrize("policy", [Policy(bases=("a" * 64,)), Policy(sites="up.*"), Policy(max_rank=1)])
def test_the_owner_has_a_say_in_the_personal_adapter_too(tmp_path: Path, policy: Policy) -> None:
    perform = Performer()
    with pytest.raises(RequestRefusedError):
        ask(PERSONALIZE, make_device(tmp_path, policy=policy), perform)
    assert not perform.jobs


def test_unusable_pictures_cost_nothing_without_privacy(tmp_path: Path) -> None:
    def missing() -> Pictures:
        raise AntherError("photos: no such folder")

    device = dataclasses.replace(make_device(tmp_path), pictures=missing)
    with pytest.raises(AntherError, match="photos"):
        ask(train_request(private=False), device)
    assert not states(device)


def test_an_evaluation_measures_the_base_once_a_run(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    for number in (1, 2):
        request = Evaluate(run="run", round=number, adapter=to_bytes(adapter(3)))
        assert ask(request, device, perform) == Evaluation(device="d", round=number, base=0.75, shared=0.5)
    measured = [job for job in perform.jobs if isinstance(job, jobs.MeasureJob)]
    assert [job.adapter is None for job in measured] == [True, False, False]
    assert all(len(job.examples) == len(PICTURES.validation) for job in measured)


def test_an_evaluation_needs_validation_pictures(tmp_path: Path) -> None:
    device = make_device(tmp_path, pictures=PICTURES._replace(validation=()))
    with pytest.raises(RequestRefusedError, match="validation"):
        ask(Evaluate(run="run", round=1, adapter=to_bytes(adapter(3))), device)


def last_train(perform: Performer) -> jobs.TrainJob:
    return [job for job in perform.jobs if isinstance(job, jobs.TrainJob)][-1]


def test_personalising(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = ask(PERSONALIZE, device, perform)
    assert reply == Personalized(device="d", seconds=4.0, joules=20.0, quality="estimate")
    train = last_train(perform)
    assert train.early_stopping is not None
    assert (train.early_stopping.every, train.early_stopping.patience) == (5, 3)
    assert len(train.early_stopping.validation) == len(PICTURES.validation)
    for name in SITES:  # it looks where the shared adapter does, and adds nothing yet
        assert torch.equal(train.start[name].a, adapter(3)[name].a[:2])
        assert train.start[name].b.eq(0).all()
    stored = device.store.personal(SITES)
    assert stored is not None
    assert stored.base == BASE
    assert all(torch.equal(stored.shared[name].b, adapter(3)[name].b) for name in SITES)
    assert not states(device)  # nothing left the device


def test_personalising_goes_on_only_over_the_same_shared_adapter(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    ask(PERSONALIZE, device)
    stored = device.store.personal(SITES)
    assert stored is not None
    ask(dataclasses.replace(PERSONALIZE, round=10), device, perform)
    assert torch.equal(last_train(perform).start["up.to_k"].b, stored.adapter["up.to_k"].b)
    changes = ({"adapter": to_bytes(adapter(3, seed=1))}, {"adapter": to_bytes(adapter(4))}, {"rank": 1})
    for number, change in enumerate(changes, start=11):
        ask(dataclasses.replace(PERSONALIZE, round=number, **change), device, perform)
        assert last_train(perform).start["up.to_k"].b.eq(0).all()


def test_personalising_asked_twice_is_done_once(tmp_path: Path) -> None:
    device, again = make_device(tmp_path), Performer()
    first = ask(PERSONALIZE, device)
    assert ask(PERSONALIZE, device, again) == first
    assert again.jobs == []


def test_personalising_without_validation_pictures_takes_every_step(tmp_path: Path) -> None:
    perform = Performer()
    ask(PERSONALIZE, make_device(tmp_path, pictures=PICTURES._replace(validation=())), perform)
    assert last_train(perform).early_stopping is None


@pytest.mark.parametrize("change", [{"rank": 0}, {"steps": 10**6}, {"look_every": 0}, {"patience": 0}])
def test_impossible_personalising_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(RequestRefusedError):
        ask(dataclasses.replace(PERSONALIZE, **change), make_device(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path, loss: float) -> None:
    class Overflows(Performer):
        def _perform(self, job: jobs.Job) -> Result:
            return loss if isinstance(job, jobs.MeasureJob) else super()._perform(job)

    request = Evaluate(run="run", round=1, adapter=to_bytes(adapter(2)))
    with pytest.raises(AntherError, match=f"base is {loss}"):
        ask(request, make_device(tmp_path), Overflows())
