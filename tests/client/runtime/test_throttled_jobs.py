"""Disconnecting the charger during training: real jobs on a tiny base, sensors read from a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client.data import Pictures
from client.device import Device
from client.power.conditions import MEASURED
from client.power.meter import Meter
from client.power.sensors import choose_sensors
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from client.runtime.throttle import Throttle
from client.runtime.throttled_jobs import Perform, wait, with_meter, with_throttle
from conf.schemas import node
from models.base.base import Base
from models.lora.adapter import init_adapter
from privacy.ledger.ledger import RESERVED, SEALED
from privacy.noise import CPU, NoiseSource, SecureNoise, SimulatedNoise
from protocol.messages import Personalize, Personalized, Reply, Train, Update
from tests.helpers.devices import make_device, to_bytes, train_request
from tests.helpers.reference_trainer import PLENTY, assert_same_bits, examples, job, nonzero_adapter, private
from training import jobs
from training.cohort import train
from training.engine import perform
from training.jobs import Cancelled, EarlyStopping, Picture, Result, TrainedAdapter

PULLED_AT = 3  # the step during which the charger is disconnected


class Charger:
    """A JSON file that a throttle reads, and a clock that advances only while sleeping."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.file, self.seconds, self.sleeps, self.back_after = folder / "power.json", 0.0, 0, 3
        self.connect()
        self.sensors = choose_sensors(node.PowerConfig(meter="file", file=str(self.file)))
        self.meter = Meter(self.sensors.source, watts=1.0, every=3600.0, clock=self.clock)
        self.throttle = Throttle(
            node.ThrottleConfig(**settings),
            self.sensors.read,
            pausing=self.meter.paused,
            clock=self.clock,
            sleep=self.sleep,
        )

    def clock(self) -> float:
        return self.seconds

    def connect(self) -> None:
        self.file.write_text(json.dumps({"charging": True, "battery": 0.9, "free_mib": 900, "watts": 10}))

    def disconnect(self) -> None:
        self.file.write_text(json.dumps({"charging": False, "battery": 0.9, "free_mib": 900, "watts": 3}))

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.sleeps += 1
        if self.sleeps == self.back_after:
            self.connect()

    def around(self, work: Perform) -> Perform:
        return with_throttle(with_meter(work, self.meter), self.throttle)


class ReportingNoise:
    """A noise source that reports the start of each step: the Poisson batch is a step's first draw."""

    def __init__(self, source: NoiseSource, tell: Callable[[int], None]) -> None:
        self._source, self._tell, self.steps, self.released = source, tell, 0, 0
        self.release = source.release

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        self.steps += 1
        self._tell(self.steps)
        return self._source.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        self.released += 1
        return self._source.rounded_gaussian(size, stddev, device)


def disconnect_at(charger: Charger) -> Callable[[int], None]:
    return lambda step: charger.disconnect() if step == PULLED_AT else None


def run(base: Base, work: list[jobs.Job], charger: Charger) -> list[Result | Exception]:
    return list(charger.around(lambda batch: perform(base, batch, memory=PLENTY, timesteps=2))(work))


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_private_job_stops_within_the_step(base: Base, tmp_path: Path, rate: float) -> None:
    """No further step is taken, whether its batch is empty or not, and no noise is drawn."""
    charger = Charger(tmp_path, max_wait_seconds=2.0)
    charger.back_after = 0  # never
    plan = private(base, "a", rate=rate, steps=50)
    assert plan.noise
    noise = ReportingNoise(plan.noise, disconnect_at(charger))
    (result,) = run(base, [dataclasses.replace(plan, noise=noise)], charger)
    assert isinstance(result, Cancelled)
    assert f"after step {PULLED_AT - 1}" in str(result)
    assert (noise.steps, noise.released) == (PULLED_AT, PULLED_AT - 1)
    assert (charger.throttle.pauses, charger.throttle.stops, charger.throttle.paused_seconds) == (1, 1, 2.0)


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_paused_private_job_is_unchanged(base: Base, tmp_path: Path, rate: float) -> None:
    charger = Charger(tmp_path)
    plan = private(base, "a", rate=rate, steps=6)
    assert plan.noise
    (result,) = run(
        base, [dataclasses.replace(plan, noise=ReportingNoise(plan.noise, disconnect_at(charger)))], charger
    )
    (expected,) = train(base, [private(base, "a", rate=rate, steps=6)], memory=PLENTY, timesteps=2)
    assert_same_bits(result, expected)
    assert (charger.throttle.pauses, charger.throttle.stops, charger.throttle.paused_seconds) == (1, 0, 3.0)


@pytest.mark.integration
@pytest.mark.parametrize("purpose", ["shared", "personal"])
def test_other_jobs_pause_and_stop(base: Base, tmp_path: Path, purpose: str) -> None:
    """For a non-private shared job, and a personal job with validation pictures."""

    def plan(**changes: object) -> jobs.TrainJob:
        stopping = EarlyStopping(validation=examples(base, 3, 7), every=2, patience=9)
        personal = {"purpose": purpose, "frozen": nonzero_adapter(base, 2, 9), "early_stopping": stopping}
        return job(base, "a", steps=8, **(personal if purpose == "personal" else {}), **changes)

    requested = [0]

    def passed() -> bool:
        """Called after each pass, which is one step here; the throttle is checked right afterwards."""
        requested[0] += 1
        if requested[0] == PULLED_AT:
            charger.disconnect()
        return False

    charger = Charger(tmp_path)
    (result,) = run(base, [plan(cancelled=passed)], charger)
    (expected,) = train(base, [plan()], memory=PLENTY, timesteps=2)
    assert isinstance(result, TrainedAdapter)
    assert_same_bits(result, expected)
    assert charger.throttle.pauses == 1

    requested[0], charger = 0, Charger(tmp_path, max_wait_seconds=1.0)
    charger.back_after = 0
    (result,) = run(base, [plan(cancelled=passed)], charger)
    assert isinstance(result, Cancelled)
    assert f"after step {PULLED_AT - 1}" in str(result)
    assert requested[0] == PULLED_AT


def test_requester_may_still_cancel(base: Base, tmp_path: Path) -> None:
    charger = Charger(tmp_path)
    (result,) = run(base, [job(base, "a", cancelled=lambda: True)], charger)
    assert isinstance(result, Cancelled)
    assert charger.throttle.stops == 0


def test_nothing_starts_without_the_charger(base: Base, tmp_path: Path) -> None:
    charger = Charger(tmp_path, max_wait_seconds=1.0)
    charger.back_after = 0
    charger.disconnect()
    work = [job(base, "a"), jobs.MeasureJob(examples=examples(base, 1, 1), adapter=None)]
    result = charger.around(lambda _: pytest.fail("it began"))(work)
    assert [type(outcome) for outcome in result] == [Cancelled, Cancelled]
    assert charger.meter.last is None


def test_meter_covers_training_without_pauses(base: Base, tmp_path: Path) -> None:
    charger = Charger(tmp_path)

    def steps() -> bool:
        charger.seconds += 5.0  # duration of a pass
        if charger.seconds == 10.0:
            charger.disconnect()
        return False

    run(base, [jobs.MeasureJob(examples=examples(base, 1, 1), adapter=None)], charger)
    assert charger.meter.last is None
    run(base, [job(base, "a", steps=4, cancelled=steps)], charger)
    assert charger.throttle.paused_seconds == 3.0
    assert charger.meter.last is not None
    assert charger.meter.last.seconds == 20.0
    # From 10 to 3 W, as stated when the pause begins; then 10 W. Readings during the pause don't count.
    assert charger.meter.last.joules == pytest.approx(10 * (10 + 3) / 2 + 10 * 10)
    assert charger.meter.last.quality == MEASURED


def real(base: Base, folder: Path, noise: Callable[[], NoiseSource], **changes: object) -> Device:
    """Return a device with the base and four pictures."""

    def picture(seed: int) -> Picture:
        return Picture(np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8), f"picture {seed}")

    device = make_device(folder / "store")
    pictures = Pictures(tuple(map(picture, range(4))), (picture(4),), ())
    return dataclasses.replace(
        device,
        report=dataclasses.replace(device.report, base=base.hash),
        sites=base.sites,
        resolution=16,
        pictures=lambda: pictures,
        noise=lambda _round, _purpose: noise(),
        **changes,
    )


def request(base: Base, *, private: bool = True) -> Train:
    plain = train_request(private=private, sent=to_bytes(init_adapter(base.sites, 3, 0)))
    return dataclasses.replace(plain, plan=dataclasses.replace(plain.plan, base=base.hash))


def answer_request(base: Base, device: Device, request_: Train | Personalize, charger: Charger) -> Reply | Exception:
    work = charger.around(lambda batch: perform(base, batch, memory=PLENTY, timesteps=2))
    return run_handlers({"": handle(request_, device)}, work)[""]


def test_paused_round_is_one_release(base: Base, tmp_path: Path) -> None:
    """Training pauses with its state, and seals one reply under the one reservation."""
    charger = Charger(tmp_path)
    device = real(base, tmp_path, lambda: ReportingNoise(SecureNoise(), disconnect_at(charger)))
    reply = answer_request(base, device, request(base), charger)
    assert isinstance(reply, Update), reply
    assert charger.throttle.pauses == 1
    assert [entry.state for entry in device.store.ledger.entries()] == [SEALED]
    assert device.store.ledger.history().events == 3  # enrolled, reserved, sealed
    assert answer_request(base, device, request(base), charger) == reply


def test_stopped_and_repeated_round_is_one_release(base: Base, tmp_path: Path) -> None:
    """The first attempt is charged and leaves nothing; the repeated request trains under the same reservation."""
    charger, sources = Charger(tmp_path, max_wait_seconds=5.0), list[ReportingNoise]()
    charger.back_after = 0

    def noise() -> ReportingNoise:
        sources.append(ReportingNoise(SecureNoise(), disconnect_at(charger) if not sources else lambda _: None))
        return sources[-1]

    device = real(base, tmp_path, noise)
    stopped = answer_request(base, device, request(base), charger)
    assert isinstance(stopped, Cancelled)
    assert [entry.state for entry in device.store.ledger.entries()] == [RESERVED]
    charged = device.store.ledger.spent(1e-3)
    still = answer_request(base, device, request(base), charger)  # still disconnected: no job starts
    assert isinstance(still, Cancelled)
    assert sources[-1].steps == 0
    charger.connect()
    reply = answer_request(base, device, request(base), charger)
    assert isinstance(reply, Update), reply
    assert [entry.state for entry in device.store.ledger.entries()] == [SEALED]
    assert device.store.ledger.spent(1e-3) == charged
    assert device.store.ledger.history().events == 3
    assert reply.epsilon == charged.value
    assert sources[-1].steps == request(base).plan.steps  # from the first step
    assert answer_request(base, device, request(base), charger) == reply


@pytest.mark.integration
def test_private_reply_has_no_measured_cost(base: Base, tmp_path: Path) -> None:
    """Time and energy depend on the sizes of Poisson batches, and on the step at which a personal adapter was best."""
    charger = Charger(tmp_path)

    class SlowPasses:
        """Passes that take 2 s each."""

        def __call__(self, batch: list[jobs.Job]) -> list[Result | Exception]:
            def passed() -> bool:
                charger.seconds += 2.0
                return False

            timed = [
                dataclasses.replace(job, cancelled=passed) if isinstance(job, jobs.TrainJob) else job for job in batch
            ]
            return list(perform(base, timed, memory=PLENTY, timesteps=2))

    def answer_slowly(request_: Train | Personalize) -> Update | Personalized:
        device = real(
            base,
            tmp_path / str(len(response)),
            lambda: SimulatedNoise(seed=1, client="d", round=1, purpose="shared"),
            measured_cost=lambda: charger.meter.last,
        )
        reply = run_handlers({"": handle(request_, device)}, with_meter(SlowPasses(), charger.meter))[""]
        assert isinstance(reply, Update | Personalized), reply
        response.append((reply.seconds, reply.joules, reply.quality))
        return reply

    response: list[tuple[float, float, str]] = []
    steps = request(base).plan.steps
    answer_slowly(request(base, private=False))
    answer_slowly(request(base))
    personal = Personalize(
        run="run",
        round=1,
        adapter=request(base).adapter,
        rank=2,
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        look_every=2,
        patience=1,
    )
    answer_slowly(personal)
    assert response[0] == (2.0 * steps, 20.0 * steps, MEASURED)
    assert response[1] == (
        5.5,
        10.0,
        "estimate",
    )  # 5 steps of 4 examples at 10 per second and 5 W, in their public duration
    assert response[2] == (1.6, 8.0, "estimate")


def test_stopping_device_does_not_wait(tmp_path: Path) -> None:
    throttle = Charger(tmp_path).throttle
    wait(throttle, 0.0)
    throttle.stop.set()
    with pytest.raises(Cancelled, match="waited"):
        wait(throttle, 3600.0)
