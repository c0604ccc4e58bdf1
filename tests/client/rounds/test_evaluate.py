"""Evaluation on a device: losses, noised gains, and their privacy cost."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from client.data import Pictures
from client.device import Device
from client.rounds import evaluate
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from privacy.accounting import PoissonGaussian, epsilon
from privacy.ledger.ledger import MEASURE, RESERVED, SEALED, SENT
from privacy.noise import SimulatedNoise
from privacy.policy import Policy, RequestRefusedError
from protocol import messages
from protocol.messages import Evaluate, Evaluation, EvaluationPrivacy, Request
from tests.helpers.devices import PICTURES, Performer, adapter, make_device, picture, to_bytes, train_request
from training import jobs

PRIVATE = EvaluationPrivacy(noise_multiplier=20.0, clip=0.2, pictures=3, delta=1e-3)
RAW = Evaluate(run="run", round=1, adapter=to_bytes(adapter(3)))
NOISED = dataclasses.replace(RAW, privacy=PRIVATE)


def answer_request(request: Request, device: Device, perform: Any = None) -> Any:
    outcome = run_handlers({"d": handle(request, device)}, perform or Performer())["d"]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def simulated(storage: Path, **changes: Any) -> Device:
    return make_device(storage, noise=SimulatedNoise(seed=0, client="d", round=1, purpose="measure"), **changes)


def states(device: Device) -> list[tuple[str, str]]:
    return [(entry.reservation.purpose, entry.state) for entry in device.store.ledger.entries()]


def with_validation(*seeds: int) -> Pictures:
    return PICTURES._replace(validation=tuple(map(picture, seeds)))


def sum_without_noise(storage: Path, *seeds: int) -> float:
    """Return the pictures' contribution to the noised sum; a simulated source repeats its noise."""
    gains = [
        answer_request(NOISED, simulated(storage / name, pictures=with_validation(*pictures))).gain
        for name, pictures in (("pictures", seeds), ("none", ()))
    ]
    return float(gains[0] - gains[1]) * PRIVATE.pictures


def test_only_a_noised_gain_is_sent(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    reply = answer_request(NOISED, device, perform)
    assert isinstance(reply, Evaluation)
    assert (reply.device, reply.round, reply.base, reply.shared, reply.release) == ("d", 1, None, None, True)
    assert reply.gain is not None
    assert [type(job) for job in perform.jobs] == [jobs.EncodeJob, jobs.MeasureEachJob, jobs.MeasureEachJob]
    measured = [job for job in perform.jobs if isinstance(job, jobs.MeasureEachJob)]
    assert [job.adapter is None for job in measured] == [True, False]
    assert all(len(job.examples) == PRIVATE.pictures for job in measured)  # including blanks
    (entry,) = device.store.ledger.entries()
    assert (entry.state, entry.reservation.purpose, entry.reservation.clip) == (SEALED, MEASURE, 0.2)
    event = PoissonGaussian(noise_multiplier=20.0, sampling_rate=1.0, steps=1)
    assert entry.reservation.mechanism == event
    assert reply.epsilon == device.store.ledger.spent(1e-3).value == epsilon([event], 1e-3).value


def test_gain_of_clipped_losses(tmp_path: Path) -> None:
    """The performer's loss is a thousandth of a picture's mean gray value, and half of that under an adapter."""
    greys = [float(picture(seed).pixels.mean()) for seed in (4, 5)]
    assert sum_without_noise(tmp_path, 4, 5) == pytest.approx(sum(greys) / 2000, abs=1e-3)


def test_at_most_the_requested_pictures_are_measured(tmp_path: Path) -> None:
    assert sum_without_noise(tmp_path / "more", 4, 5, 6, 7) == sum_without_noise(tmp_path / "three", 4, 5, 6)


def test_one_picture_changes_sum_by_at_most_clip(tmp_path: Path) -> None:
    whole = sum_without_noise(tmp_path / "whole", 4, 5, 6)
    for index in range(3):
        pictures = [seed for seed in (4, 5, 6) if seed != 4 + index]
        others_sum = sum_without_noise(tmp_path / str(index), *pictures)
        assert 0 < whole - others_sum <= PRIVATE.clip * (1 + 1e-9)


def test_noise_is_fresh_for_each_device(tmp_path: Path) -> None:
    response = {answer_request(NOISED, make_device(tmp_path / str(number))).gain for number in range(8)}
    assert len(response) == 8


def test_simulated_noise_is_no_release(tmp_path: Path) -> None:
    device = simulated(tmp_path)
    assert not answer_request(NOISED, device).release
    assert not device.store.ledger.entries()[0].reservation.release


def test_no_validation_pictures_give_only_noise(tmp_path: Path) -> None:
    """A refusal would reveal that there are none; without privacy nothing is protected anyway."""
    device, perform = make_device(tmp_path, pictures=with_validation()), Performer()
    reply = answer_request(NOISED, device, perform)
    assert reply.gain != 0
    assert [len(job.examples) for job in perform.jobs if isinstance(job, jobs.MeasureEachJob)] == [3, 3]
    assert states(device) == [(MEASURE, SEALED)]
    with pytest.raises(RequestRefusedError, match="no validation pictures"):
        answer_request(RAW, make_device(tmp_path / "raw", pictures=with_validation()))


def test_repeated_request_is_charged_once(tmp_path: Path) -> None:
    first, perform = answer_request(NOISED, make_device(tmp_path)), Performer()
    other = dataclasses.replace(
        NOISED, adapter=to_bytes(adapter(4))
    )  # a different noised gain would be a second release
    for request in (NOISED, other):
        assert answer_request(request, make_device(tmp_path), perform) == first
    assert not perform.jobs
    assert states(make_device(tmp_path)) == [(MEASURE, SEALED)]
    with pytest.raises(RequestRefusedError, match="another plan"):
        answer_request(
            dataclasses.replace(NOISED, privacy=dataclasses.replace(PRIVATE, clip=0.1)), make_device(tmp_path)
        )


def test_charge_precedes_measurement(tmp_path: Path) -> None:
    device = make_device(tmp_path)

    def fail(batch: list[jobs.Job]) -> list[jobs.Result | Exception]:
        for job in batch:
            if isinstance(job, jobs.MeasureEachJob):
                assert states(device) == [(MEASURE, RESERVED)]
                return [MemoryError("too big")]
        return list(Performer()(batch))

    assert isinstance(run_handlers({0: handle(NOISED, device)}, fail)[0], MemoryError)
    spent = device.store.ledger.spent(1e-3)
    answer_request(NOISED, device)
    assert device.store.ledger.spent(1e-3) == spent
    assert states(device) == [(MEASURE, SEALED)]


def test_training_and_evaluation_have_own_reservations(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    update = answer_request(train_request(), device)
    reply = answer_request(NOISED, device)
    assert reply.epsilon > update.epsilon
    assert states(device) == [("train", SEALED), (MEASURE, SEALED)]
    answer_request(train_request(number=2), device)
    assert states(device) == [("train", SENT), (MEASURE, SEALED), ("train", SEALED)]
    assert answer_request(NOISED, device) == reply  # the numbers of plans and of rounds may differ
    answer_request(dataclasses.replace(NOISED, round=2), device)
    assert states(device) == [("train", SENT), (MEASURE, SENT), ("train", SEALED), (MEASURE, SEALED)]
    with pytest.raises(RequestRefusedError, match=r"the measure of round 1 .* can't be sent again"):
        answer_request(NOISED, device)


def test_training_and_evaluation_share_the_budget(tmp_path: Path) -> None:
    train = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=5)
    measure = PoissonGaussian(noise_multiplier=20.0, sampling_rate=1.0, steps=1)
    cap = epsilon([train, measure, train], 1e-3).value * (1 - 1e-6)
    device, perform = make_device(tmp_path, policy=Policy(max_epsilon=cap, delta=1e-3)), Performer()
    answer_request(train_request(), device, perform)
    answer_request(NOISED, device, perform)
    with pytest.raises(RequestRefusedError, match="allows"):
        answer_request(train_request(number=2), device, perform)
    lean = make_device(tmp_path / "lean", policy=Policy(max_epsilon=0.9 * epsilon([measure], 1e-3).value, delta=1e-3))
    with pytest.raises(RequestRefusedError, match="allows"):
        answer_request(NOISED, lean, perform)
    assert not states(lean)
    assert sum(isinstance(job, jobs.MeasureEachJob) for job in perform.jobs) == 2


@pytest.mark.parametrize(
    ("policy", "request_"),
    [
        (Policy(measures="none"), RAW),
        (Policy(measures="none"), NOISED),
        (Policy(measures="noised"), RAW),
        (Policy(max_epsilon=8.0), RAW),
        (Policy(min_noise_multiplier=21.0), NOISED),
        (Policy(max_clip=0.1), NOISED),
        (Policy(bases=("a" * 64,)), RAW),
        (Policy(bases=("a" * 64,)), NOISED),
        (Policy(sites="up.*"), NOISED),
        (Policy(max_rank=2), NOISED),
    ],
)
def test_forbidden_requests_cost_nothing(tmp_path: Path, policy: Policy, request_: Evaluate) -> None:
    device, perform = make_device(tmp_path, policy=policy), Performer()
    with pytest.raises(RequestRefusedError):
        answer_request(request_, device, perform)
    assert not perform.jobs
    assert not states(device)


def test_losses_without_noise_end_the_guarantee(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    for number in (1, 2, 3):  # recorded once: no guarantee is left to lose
        answer_request(dataclasses.replace(RAW, round=number), device)
    assert states(device) == [(MEASURE, RESERVED)]
    assert device.store.ledger.spent(1e-3).value == math.inf
    for request in (train_request(), dataclasses.replace(NOISED, round=4)):
        with pytest.raises(RequestRefusedError, match="no ε can be promised"):
            answer_request(request, device)
    other = make_device(tmp_path / "other")
    answer_request(train_request(private=False), other)
    answer_request(RAW, other)
    assert states(other) == [("train", RESERVED)]


@pytest.mark.parametrize("first", [train_request(), NOISED])
def test_no_release_without_noise_after_private_one(tmp_path: Path, first: Request) -> None:
    device, perform = make_device(tmp_path), Performer()
    answer_request(first, device)
    for request in (dataclasses.replace(RAW, round=5), train_request(number=5, private=False)):
        with pytest.raises(RequestRefusedError, match="nothing without it since"):
            answer_request(request, device, perform)
    assert not any(isinstance(job, (jobs.TrainJob, jobs.MeasureJob)) for job in perform.jobs)
    assert len(states(device)) == 1


def test_infinite_epsilon_measures_nothing(tmp_path: Path) -> None:
    device, perform = make_device(tmp_path), Performer()
    request = dataclasses.replace(NOISED, privacy=dataclasses.replace(PRIVATE, delta=1e-19))
    for _ in range(2):
        with pytest.raises(RequestRefusedError, match=r"privacy\.delta=1e-19: .* no finite ε"):
            answer_request(request, device, perform)
    assert not any(isinstance(job, jobs.MeasureEachJob) for job in perform.jobs)


def test_memory_does_not_depend_on_assumed_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are measured in small groups: the number of passes doesn't depend on the pictures, and the gain is
    unchanged.
    """
    request = dataclasses.replace(NOISED, privacy=dataclasses.replace(PRIVATE, pictures=7))
    contents, passes, gains = with_validation(4, 5, 6), [], []
    for at_once in (256, 2):
        monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
        for pictures in (contents, with_validation()):
            perform = Performer()
            device = simulated(tmp_path / f"{at_once} {len(pictures.validation)}", pictures=pictures)
            gains.append(answer_request(request, device, perform).gain)
            passes.append([len(job.examples) for job in perform.jobs if isinstance(job, jobs.MeasureEachJob)])
    assert passes == [[7, 7], [7, 7], [2, 2, 2, 2, 2, 2, 1, 1], [2, 2, 2, 2, 2, 2, 1, 1]]
    assert gains[:2] == gains[2:]
    assert gains[0] != gains[1]


def test_sealed_gain_is_the_message_sent(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    reply = answer_request(NOISED, device)
    reservation = device.store.ledger.entries()[0].reservation
    sealed = device.store.ledger.sealed(reservation.key, reservation.plan)
    assert sealed is not None
    assert messages.from_json(Evaluation, sealed.decode()) == reply
