"""The charger is pulled in the middle of training: real jobs on a tiny base, sensors read from a file."""

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

PULLED_AT = 3  # the step during which it happens


class Charger:
    """A JSON file that a throttle reads, and a clock that advances only while sleeping."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.file, self.seconds, self.sleeps, self.back_after = folder / "power.json", 0.0, 0, 3
        self.plug()
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

    def plug(self) -> None:
        self.file.write_text(json.dumps({"charging": True, "battery": 0.9, "free_mib": 900, "watts": 10}))

    def pull(self) -> None:
        self.file.write_text(json.dumps({"charging": False, "battery": 0.9, "free_mib": 900, "watts": 3}))

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.sleeps += 1
        if self.sleeps == self.back_after:
            self.plug()

    def around(self, work: Perform) -> Perform:
        return with_throttle(with_meter(work, self.meter), self.throttle)


class Telling:
    """A source of noise that says when a step begins: its Poisson batch is what the step draws first."""

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


def pulls(charger: Charger) -> Callable[[int], None]:
    return lambda step: charger.pull() if step == PULLED_AT else None


def run(base: Base, work: list[jobs.Job], charger: Charger) -> list[Result | Exception]:
    return list(charger.around(lambda batch: perform(base, batch, memory=PLENTY, timesteps=2))(work))


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_a_private_job_stops_within_the_step(base: Base, tmp_path: Path, rate: float) -> None:
    """No step is taken after it, neither of a batch that is there nor of one that is empty; no noise is drawn."""
    charger = Charger(tmp_path, max_wait_seconds=2.0)
    charger.back_after = 0  # never
    plan = private(base, "a", rate=rate, steps=50)
    assert plan.noise
    noise = Telling(plan.noise, pulls(charger))
    (found,) = run(base, [dataclasses.replace(plan, noise=noise)], charger)
    assert isinstance(found, Cancelled)
    assert f"after step {PULLED_AT - 1}" in str(found)
    assert (noise.steps, noise.released) == (PULLED_AT, PULLED_AT - 1)
    assert (charger.throttle.pauses, charger.throttle.stops, charger.throttle.paused_seconds) == (1, 1, 2.0)


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_a_private_job_goes_on_as_if_nothing_had_been(base: Base, tmp_path: Path, rate: float) -> None:
    charger = Charger(tmp_path)
    plan = private(base, "a", rate=rate, steps=6)
    assert plan.noise
    (found,) = run(base, [dataclasses.replace(plan, noise=Telling(plan.noise, pulls(charger)))], charger)
    (wanted,) = train(base, [private(base, "a", rate=rate, steps=6)], memory=PLENTY, timesteps=2)
    assert_same_bits(found, wanted)
    assert (charger.throttle.pauses, charger.throttle.stops, charger.throttle.paused_seconds) == (1, 0, 3.0)


@pytest.mark.parametrize("purpose", ["shared", "personal"])
def test_any_other_job_too(base: Base, tmp_path: Path, purpose: str) -> None:
    """A shared one, and a personal one that is trained on top of it and looks at validation pictures in between."""

    def plan(**changes: object) -> jobs.TrainJob:
        stopping = EarlyStopping(validation=examples(base, 3, 7), every=2, patience=9)
        personal = {"purpose": purpose, "frozen": nonzero_adapter(base, 2, 9), "early_stopping": stopping}
        return job(base, "a", steps=8, **(personal if purpose == "personal" else {}), **changes)

    asked = [0]

    def passed() -> bool:
        """Asked after each pass, which is a step here; and the guard right after it."""
        asked[0] += 1
        if asked[0] == PULLED_AT:
            charger.pull()
        return False

    charger = Charger(tmp_path)
    (found,) = run(base, [plan(cancelled=passed)], charger)
    (wanted,) = train(base, [plan()], memory=PLENTY, timesteps=2)
    assert isinstance(found, TrainedAdapter)
    assert_same_bits(found, wanted)
    assert charger.throttle.pauses == 1

    asked[0], charger = 0, Charger(tmp_path, max_wait_seconds=1.0)
    charger.back_after = 0
    (found,) = run(base, [plan(cancelled=passed)], charger)
    assert isinstance(found, Cancelled)
    assert f"after step {PULLED_AT - 1}" in str(found)
    assert asked[0] == PULLED_AT


def test_who_asked_may_still_cancel(base: Base, tmp_path: Path) -> None:
    charger = Charger(tmp_path)
    (found,) = run(base, [job(base, "a", cancelled=lambda: True)], charger)
    assert isinstance(found, Cancelled)
    assert charger.throttle.stops == 0


def test_nothing_is_begun_without_the_charger(base: Base, tmp_path: Path) -> None:
    charger = Charger(tmp_path, max_wait_seconds=1.0)
    charger.back_after = 0
    charger.pull()
    work = [job(base, "a"), jobs.MeasureJob(examples=examples(base, 1, 1), adapter=None)]
    found = charger.around(lambda _: pytest.fail("it began"))(work)
    assert [type(outcome) for outcome in found] == [Cancelled, Cancelled]
    assert charger.meter.last is None


def test_only_training_is_measured_and_pauses_are_not(base: Base, tmp_path: Path) -> None:
    charger = Charger(tmp_path)

    def steps() -> bool:
        charger.seconds += 5.0  # that a pass took
        if charger.seconds == 10.0:
            charger.pull()
        return False

    run(base, [jobs.MeasureJob(examples=examples(base, 1, 1), adapter=None)], charger)
    assert charger.meter.last is None
    run(base, [job(base, "a", steps=4, cancelled=steps)], charger)
    assert charger.throttle.paused_seconds == 3.0
    assert charger.meter.last is not None
    assert charger.meter.last.seconds == 20.0
    # From 10 to 3 W, which the file says when it pauses; then 10 W. What it says meanwhile is nobody's.
    assert charger.meter.last.joules == pytest.approx(10 * (10 + 3) / 2 + 10 * 10)
    assert charger.meter.last.quality == MEASURED


def real(base: Base, folder: Path, noise: Callable[[], NoiseSource], **changes: object) -> Device:
    """A device that holds the base, and gives four pictures."""

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


def ask(base: Base, device: Device, asked: Train | Personalize, charger: Charger) -> Reply | Exception:
    work = charger.around(lambda batch: perform(base, batch, memory=PLENTY, timesteps=2))
    return run_handlers({"": handle(asked, device)}, work)[""]


def test_one_release_though_the_charger_was_pulled(base: Base, tmp_path: Path) -> None:
    """It waits with what it has, and seals one reply under the one reservation."""
    charger = Charger(tmp_path)
    device = real(base, tmp_path, lambda: Telling(SecureNoise(), pulls(charger)))
    reply = ask(base, device, request(base), charger)
    assert isinstance(reply, Update), reply
    assert charger.throttle.pauses == 1
    assert [entry.state for entry in device.store.ledger.entries()] == [SEALED]
    assert device.store.ledger.history().events == 3  # enrolled, reserved, sealed
    assert ask(base, device, request(base), charger) == reply


def test_one_release_though_it_stopped_and_began_again(base: Base, tmp_path: Path) -> None:
    """The first attempt is charged and leaves nothing; asked again it trains under the same reservation."""
    charger, sources = Charger(tmp_path, max_wait_seconds=5.0), list[Telling]()
    charger.back_after = 0

    def noise() -> Telling:
        sources.append(Telling(SecureNoise(), pulls(charger) if not sources else lambda _: None))
        return sources[-1]

    device = real(base, tmp_path, noise)
    stopped = ask(base, device, request(base), charger)
    assert isinstance(stopped, Cancelled)
    assert [entry.state for entry in device.store.ledger.entries()] == [RESERVED]
    charged = device.store.ledger.spent(1e-3)
    still = ask(base, device, request(base), charger)  # not yet: nothing is even begun
    assert isinstance(still, Cancelled)
    assert sources[-1].steps == 0
    charger.plug()
    reply = ask(base, device, request(base), charger)
    assert isinstance(reply, Update), reply
    assert [entry.state for entry in device.store.ledger.entries()] == [SEALED]
    assert device.store.ledger.spent(1e-3) == charged
    assert device.store.ledger.history().events == 3
    assert reply.epsilon == charged.value
    assert sources[-1].steps == request(base).plan.steps  # anew, from the first step
    assert ask(base, device, request(base), charger) == reply


def test_a_reply_tells_what_was_measured_unless_that_is_private(base: Base, tmp_path: Path) -> None:
    """Time and energy follow the sizes of Poisson batches, and the step at which a personal adapter was best."""
    charger = Charger(tmp_path)

    class Slow:
        """Passes that take 2 s each."""

        def __call__(self, batch: list[jobs.Job]) -> list[Result | Exception]:
            def passed() -> bool:
                charger.seconds += 2.0
                return False

            timed = [
                dataclasses.replace(job, cancelled=passed) if isinstance(job, jobs.TrainJob) else job for job in batch
            ]
            return list(perform(base, timed, memory=PLENTY, timesteps=2))

    def tell(asked: Train | Personalize) -> Update | Personalized:
        device = real(
            base,
            tmp_path / str(len(told)),
            lambda: SimulatedNoise(seed=1, client="d", round=1, purpose="shared"),
            measured_cost=lambda: charger.meter.last,
        )
        found = run_handlers({"": handle(asked, device)}, with_meter(Slow(), charger.meter))[""]
        assert isinstance(found, Update | Personalized), found
        told.append((found.seconds, found.joules, found.quality))
        return found

    told: list[tuple[float, float, str]] = []
    steps = request(base).plan.steps
    tell(request(base, private=False))
    tell(request(base))
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
    tell(personal)
    assert told[0] == (2.0 * steps, 20.0 * steps, MEASURED)
    assert told[1] == (5.5, 10.0, "estimate")  # 5 steps of 4 at 10 a second and 5 W, in their public time
    assert told[2] == (1.6, 8.0, "estimate")


def test_a_device_that_is_to_stop_does_not_wait(tmp_path: Path) -> None:
    throttle = Charger(tmp_path).throttle
    wait(throttle, 0.0)
    throttle.stop.set()
    with pytest.raises(Cancelled, match="waited"):
        wait(throttle, 3600.0)
