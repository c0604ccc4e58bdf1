"""Energy over training, with a clock that the test sets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from client.power.conditions import ESTIMATE, MEASURED
from client.power.meter import LONGEST, EnergyIntegral, EnergySource, Meter, TrainingCost, total


class Device:
    """A clock, and what a sensor says at any time."""

    def __init__(self, watts: Callable[[float], float | None]) -> None:
        self.now, self._watts = 100.0, watts

    def clock(self) -> float:
        return self.now

    def read(self) -> float | None:
        return self._watts(self.now)

    def meter(self, **source: object) -> Meter:
        made = EnergySource(name="fake", covers="all", read=self.read, **source)  # type: ignore[arg-type]
        return Meter(made, watts=5.0, every=3600.0, clock=self.clock)  # a thread that never gets to it


def test_a_steady_load() -> None:
    device = Device(lambda _: 8.0)
    with (meter := device.meter()):
        device.now += 20.0
    assert meter.last == TrainingCost(20.0, 160.0, MEASURED)


def test_a_source_that_only_estimates_says_so() -> None:
    device = Device(lambda _: 8.0)
    with (meter := device.meter(quality=ESTIMATE)):
        device.now += 2.0
    assert meter.last == TrainingCost(2.0, 16.0, ESTIMATE)


def test_joules_so_far() -> None:
    device = Device(lambda now: 7.0 * now)
    with (meter := device.meter(counts=True)):
        device.now += 2 * LONGEST  # a counter counts meanwhile
    assert meter.last == TrainingCost(2 * LONGEST, pytest.approx(14.0 * LONGEST), MEASURED)


class Looks:
    """Stands in for the end of a meter, so that its thread's work is done here, so many times."""

    def __init__(self, times: int) -> None:
        self._left = times

    def wait(self, _: float) -> bool:
        self._left -= 1
        return self._left < 0

    def is_set(self) -> bool:
        return False


def test_a_pause_counts_neither_as_time_nor_as_energy() -> None:
    """Short ones, that a missing reading could be taken for; and what the thread would find meanwhile is not read."""
    paused = [False]
    device = Device(lambda _: 1 / 0 if paused[0] else 10.0)
    with (meter := device.meter()):
        for seconds in (9.0, 4.0, 1.0):
            device.now += seconds
            with meter.paused():
                paused[0] = True
                device.now += 2.0
                meter._look(Looks(3))  # type: ignore[arg-type]
                device.now += 2.0
                paused[0] = False
        meter._look(Looks(1))  # type: ignore[arg-type]
        device.now += 1.0
        meter._look(Looks(2))  # type: ignore[arg-type]
    assert meter.last == TrainingCost(15.0, pytest.approx(150.0), MEASURED)
    assert not meter._failed


def test_a_pause_before_or_after_is_nobodys() -> None:
    device = Device(lambda _: 10.0)
    meter = device.meter()
    with meter.paused():
        device.now += 5.0
    assert meter.last is None
    with meter:
        device.now += 1.0
    with meter.paused():
        device.now += 5.0
    assert meter.last == TrainingCost(1.0, 10.0, MEASURED)


def test_each_time_anew() -> None:
    device = Device(lambda _: 10.0)
    meter = device.meter()
    for seconds in (3.0, 2.0):
        with meter:
            device.now += seconds
        assert meter.last == TrainingCost(seconds, 10 * seconds, MEASURED)


def test_without_a_source_seconds_are_real_and_joules_are_not() -> None:
    device = Device(lambda _: None)
    with (meter := Meter(None, watts=5.0, clock=device.clock)):
        device.now += 4.0
        with meter.paused():
            device.now += 4.0
    assert meter.last == TrainingCost(4.0, 20.0, ESTIMATE)


@pytest.mark.parametrize("broken", [lambda _: None, lambda _: 1 // 0])
def test_a_sensor_that_fails_makes_it_an_estimate(
    broken: Callable[[float], float | None], caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(broken)
    with caplog.at_level(logging.WARNING), (meter := device.meter()):
        device.now += 4.0
        with meter.paused():
            pass
    assert meter.last == TrainingCost(4.0, 20.0, ESTIMATE)
    assert len(caplog.records) <= 1


def test_work_that_fails_is_measured_and_fails() -> None:
    device = Device(lambda _: 2.0)
    meter = device.meter()

    def work() -> None:
        with meter:
            device.now += 3.0
            raise OSError("the work's own")

    with pytest.raises(OSError, match="own"):
        work()
    assert meter.last == TrainingCost(3.0, 6.0, MEASURED)


def test_the_thread_reads_in_between_and_ends() -> None:
    """Once it has read what was only there for a moment, the test goes on."""
    seen = threading.Event()
    device = Device(lambda _: 10.0)

    def read() -> float:
        if threading.current_thread().name == "meter":
            seen.set()
        return 10.0

    with (meter := Meter(EnergySource(name="x", covers="x", read=read), watts=1.0, every=0.001, clock=device.clock)):
        assert seen.wait(60)
        device.now += 2.0
    assert meter.last == TrainingCost(2.0, 20.0, MEASURED)
    for thread in threading.enumerate():
        if thread.name == "meter":
            thread.join(60)
            assert not thread.is_alive()


def integral(readings: list[tuple[float, float | None]], *, counts: bool = False) -> EnergyIntegral:
    found = EnergyIntegral(counts)
    for at, value in readings:
        found.add(at, value)
    return found


def test_trapezoids() -> None:
    found = integral([(0, 2.0), (1, 4.0), (3, 0.0)])
    assert (found.seconds, found.joules) == (3.0, 3.0 + 4.0)


def test_a_missing_reading_is_bridged_and_a_long_gap_is_not() -> None:
    assert integral([(0, 2.0), (1, None), (2, 4.0)]).joules == 6.0
    found = integral([(0, 2.0), (LONGEST + 1, 2.0), (LONGEST + 2, 4.0)])
    assert (found.seconds, found.joules) == (1.0, 3.0)


def test_a_counter_that_went_back_is_left_out() -> None:
    found = integral([(0, 10.0), (1, 15.0), (2, 1.0), (3, 4.0)], counts=True)
    assert (found.seconds, found.joules) == (2.0, 8.0)


@pytest.mark.parametrize(
    ("covered", "spent"),
    [
        (10.0, TrainingCost(10.0, 40.0, MEASURED)),
        (5.0, TrainingCost(10.0, 80.0, MEASURED)),  # the rest is taken for alike
        (4.9, TrainingCost(10.0, 50.0, ESTIMATE)),
        (0.0, TrainingCost(10.0, 50.0, ESTIMATE)),
    ],
)
def test_what_was_not_covered(covered: float, spent: TrainingCost) -> None:
    assert total(EnergyIntegral(counts=False, seconds=covered, joules=40.0), seconds=10.0, watts=5.0) == spent


def test_nothing_at_all_took_nothing() -> None:
    assert total(None, seconds=0.0, watts=5.0) == TrainingCost(0.0, 0.0, ESTIMATE)
    assert total(EnergyIntegral(counts=True), seconds=0.0, watts=5.0) == TrainingCost(0.0, 0.0, ESTIMATE)
