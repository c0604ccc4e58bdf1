"""Energy of training, with a clock that the test sets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from client.power.conditions import ESTIMATE, MEASURED
from client.power.meter import MAX_GAP, EnergyIntegral, EnergySource, Meter, TrainingCost, total_cost


class MeteredDevice:
    """A clock, and a sensor whose value depends on the time."""

    def __init__(self, watts: Callable[[float], float | None]) -> None:
        self.now, self._watts = 100.0, watts

    def clock(self) -> float:
        return self.now

    def read(self) -> float | None:
        return self._watts(self.now)

    def meter(self, **source: object) -> Meter:
        created = EnergySource(name="fake", covers="all", read=self.read, **source)  # type: ignore[arg-type]
        return Meter(created, watts=5.0, every=3600.0, clock=self.clock)  # the thread never takes a reading


def test_steady_load() -> None:
    device = MeteredDevice(lambda _: 8.0)
    with (meter := device.meter()):
        device.now += 20.0
    assert meter.last == TrainingCost(20.0, 160.0, MEASURED)


def test_estimated_source_gives_estimate() -> None:
    device = MeteredDevice(lambda _: 8.0)
    with (meter := device.meter(quality=ESTIMATE)):
        device.now += 2.0
    assert meter.last == TrainingCost(2.0, 16.0, ESTIMATE)


def test_joule_counter() -> None:
    device = MeteredDevice(lambda now: 7.0 * now)
    with (meter := device.meter(counts=True)):
        device.now += 2 * MAX_GAP  # the counter runs meanwhile
    assert meter.last == TrainingCost(2 * MAX_GAP, pytest.approx(14.0 * MAX_GAP), MEASURED)


class Stops:
    """Replaces a meter's stop event, so that its thread's loop runs here, a given number of times."""

    def __init__(self, times: int) -> None:
        self._left = times

    def wait(self, _: float) -> bool:
        self._left -= 1
        return self._left < 0

    def is_set(self) -> bool:
        return False


def test_pauses_are_not_counted() -> None:
    """Pauses short enough to pass for a missing reading; the thread's readings during them are ignored."""
    paused = [False]
    device = MeteredDevice(lambda _: 1 / 0 if paused[0] else 10.0)
    with (meter := device.meter()):
        for seconds in (9.0, 4.0, 1.0):
            device.now += seconds
            with meter.paused():
                paused[0] = True
                device.now += 2.0
                meter._sample_loop(Stops(3))  # type: ignore[arg-type]
                device.now += 2.0
                paused[0] = False
        meter._sample_loop(Stops(1))  # type: ignore[arg-type]
        device.now += 1.0
        meter._sample_loop(Stops(2))  # type: ignore[arg-type]
    assert meter.last == TrainingCost(15.0, pytest.approx(150.0), MEASURED)
    assert not meter._failed


def test_pause_outside_training_has_no_effect() -> None:
    device = MeteredDevice(lambda _: 10.0)
    meter = device.meter()
    with meter.paused():
        device.now += 5.0
    assert meter.last is None
    with meter:
        device.now += 1.0
    with meter.paused():
        device.now += 5.0
    assert meter.last == TrainingCost(1.0, 10.0, MEASURED)


def test_meter_restarts_each_time() -> None:
    device = MeteredDevice(lambda _: 10.0)
    meter = device.meter()
    for seconds in (3.0, 2.0):
        with meter:
            device.now += seconds
        assert meter.last == TrainingCost(seconds, 10 * seconds, MEASURED)


def test_no_source_gives_estimated_joules() -> None:
    device = MeteredDevice(lambda _: None)
    with (meter := Meter(None, watts=5.0, clock=device.clock)):
        device.now += 4.0
        with meter.paused():
            device.now += 4.0
    assert meter.last == TrainingCost(4.0, 20.0, ESTIMATE)


@pytest.mark.parametrize("broken", [lambda _: None, lambda _: 1 // 0])
def test_failing_sensor_gives_estimate(
    broken: Callable[[float], float | None], caplog: pytest.LogCaptureFixture
) -> None:
    device = MeteredDevice(broken)
    with caplog.at_level(logging.WARNING), (meter := device.meter()):
        device.now += 4.0
        with meter.paused():
            pass
    assert meter.last == TrainingCost(4.0, 20.0, ESTIMATE)
    assert len(caplog.records) <= 1


def test_failing_work_is_measured() -> None:
    device = MeteredDevice(lambda _: 2.0)
    meter = device.meter()

    def work() -> None:
        with meter:
            device.now += 3.0
            raise OSError("the work's own")

    with pytest.raises(OSError, match="own"):
        work()
    assert meter.last == TrainingCost(3.0, 6.0, MEASURED)


def test_thread_takes_readings_and_ends() -> None:
    """The test continues once the thread has read a value that was available only briefly."""
    observed = threading.Event()
    device = MeteredDevice(lambda _: 10.0)

    def read() -> float:
        if threading.current_thread().name == "meter":
            observed.set()
        return 10.0

    with (meter := Meter(EnergySource(name="x", covers="x", read=read), watts=1.0, every=0.001, clock=device.clock)):
        assert observed.wait(60)
        device.now += 2.0
    assert meter.last == TrainingCost(2.0, 20.0, MEASURED)
    for thread in threading.enumerate():
        if thread.name == "meter":
            thread.join(60)
            assert not thread.is_alive()


def integral(readings: list[tuple[float, float | None]], *, counts: bool = False) -> EnergyIntegral:
    result = EnergyIntegral(counts)
    for at, value in readings:
        result.add(at, value)
    return result


def test_trapezoidal_rule() -> None:
    energy = integral([(0, 2.0), (1, 4.0), (3, 0.0)])
    assert (energy.seconds, energy.joules) == (3.0, 3.0 + 4.0)


def test_long_gap_is_not_integrated() -> None:
    assert integral([(0, 2.0), (1, None), (2, 4.0)]).joules == 6.0
    energy = integral([(0, 2.0), (MAX_GAP + 1, 2.0), (MAX_GAP + 2, 4.0)])
    assert (energy.seconds, energy.joules) == (1.0, 3.0)


def test_decreasing_counter_is_ignored() -> None:
    energy = integral([(0, 10.0), (1, 15.0), (2, 1.0), (3, 4.0)], counts=True)
    assert (energy.seconds, energy.joules) == (2.0, 8.0)


@pytest.mark.parametrize(
    ("covered", "spent"),
    [
        (10.0, TrainingCost(10.0, 40.0, MEASURED)),
        (5.0, TrainingCost(10.0, 80.0, MEASURED)),  # the rest is extrapolated
        (4.9, TrainingCost(10.0, 50.0, ESTIMATE)),
        (0.0, TrainingCost(10.0, 50.0, ESTIMATE)),
    ],
)
def test_extrapolation_to_uncovered_time(covered: float, spent: TrainingCost) -> None:
    assert total_cost(EnergyIntegral(counts=False, seconds=covered, joules=40.0), seconds=10.0, watts=5.0) == spent


def test_no_time_costs_nothing() -> None:
    assert total_cost(None, seconds=0.0, watts=5.0) == TrainingCost(0.0, 0.0, ESTIMATE)
    assert total_cost(EnergyIntegral(counts=True), seconds=0.0, watts=5.0) == TrainingCost(0.0, 0.0, ESTIMATE)
