"""When training pauses and stops, and the cost of checking."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from client.power.conditions import Conditions
from client.runtime.throttle import MAX_AGE, Throttle, interval, pause_reason, shortage
from conf.schemas import node

FINE = Conditions(
    charging=True, battery=0.9, celsius=50.0, throttled=False, free_mib=900, owner_active=True, metered=True
)
CAREFUL = node.ThrottleConfig(require_idle=True, require_unmetered=True)


class SensorClock:
    """Settable conditions and a clock; the functions in `later` run while it sleeps."""

    def __init__(self, now: Conditions = FINE, cost: float = 0.0) -> None:
        self.now, self.seconds, self.readings, self.slept = now, 0.0, 0, list[float]()
        self.later: list[Callable[[], None]] = []
        self._cost = cost

    def read(self) -> Conditions:
        self.readings += 1
        self.seconds += self._cost
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
        if self.later:
            self.later.pop(0)()

    def set_later(self, **changes: object) -> Callable[[], None]:
        def change() -> None:
            self.now = replace(self.now, **changes)

        return change

    def throttle(self, **settings: object) -> Throttle:
        return Throttle(node.ThrottleConfig(**settings), self.read, clock=lambda: self.seconds, sleep=self.sleep)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"charging": False}, "not charging"),
        ({"battery": 0.39}, "battery"),
        ({"celsius": 80.5}, "°C"),
        ({"battery_celsius": 40.5}, "the battery: temperature 40 °C"),
        ({"throttled": True}, "slowed down"),
        ({}, "in use"),
        ({"owner_active": False}, "metered"),
        ({"owner_active": False, "metered": False}, None),
        ({"owner_active": None, "metered": None}, None),
    ],
)
def test_reasons(changes: dict[str, object], reason: str | None) -> None:
    result = pause_reason(replace(FINE, **changes), CAREFUL)  # type: ignore[arg-type]
    assert result is None if reason is None else result is not None and reason in result


def test_unknown_values_are_no_reason() -> None:
    """A desktop has no battery, and a board can't detect its owner."""
    assert pause_reason(Conditions(), CAREFUL) is None
    assert shortage(Conditions(), CAREFUL) is None


def test_owner_may_disable_all_limits() -> None:
    worst = Conditions(
        charging=False,
        battery=0.0,
        celsius=200.0,
        battery_celsius=90.0,
        throttled=True,
        free_mib=0,
        owner_active=True,
        metered=True,
    )
    lax = node.ThrottleConfig(
        require_charging=False, min_battery=0.0, max_celsius=None, max_battery_celsius=None, min_free_mib=0.0
    )
    assert pause_reason(worst, lax) is None
    assert pause_reason(worst, lax, waiting=True) is None
    assert shortage(worst, lax) is None


def test_memory_shortage() -> None:
    assert shortage(replace(FINE, free_mib=149.0), node.ThrottleConfig()) is not None
    assert shortage(replace(FINE, free_mib=150.0), node.ThrottleConfig()) is None


@pytest.mark.parametrize(
    ("at", "well"),
    [
        ({"battery": 0.4}, {"battery": 0.46}),
        ({"celsius": 80.0}, {"celsius": 75.0}),
        ({"battery_celsius": 40.0}, {"battery_celsius": 35.0}),
    ],
)
def test_resume_needs_margin(at: dict[str, object], well: dict[str, object]) -> None:
    edge = replace(FINE, **at)  # type: ignore[arg-type]
    assert pause_reason(edge, node.ThrottleConfig()) is None
    assert pause_reason(edge, node.ThrottleConfig(), waiting=True) is not None
    assert pause_reason(replace(FINE, **well), node.ThrottleConfig(), waiting=True) is None  # type: ignore[arg-type]


def test_limit_of_full_battery_can_be_met() -> None:
    assert pause_reason(replace(FINE, battery=1.0), node.ThrottleConfig(min_battery=1.0), waiting=True) is None


def test_no_reason_to_pause() -> None:
    device = SensorClock()
    throttle = device.throttle()
    assert not throttle()
    assert throttle.must_wait() is None
    assert (throttle.pauses, throttle.stops, throttle.paused_seconds, throttle.last_reason) == (0, 0, 0.0, None)


def test_pause_until_conditions_hold(caplog: pytest.LogCaptureFixture) -> None:
    device = SensorClock(replace(FINE, charging=False))
    throttle = device.throttle(poll_seconds=2.0)
    assert throttle.must_wait() == "the device is not charging"
    device.later = [lambda: None, device.set_later(charging=True)]
    with caplog.at_level(logging.INFO):
        assert not throttle()
    assert device.slept == [2.0, 2.0]
    assert (throttle.pauses, throttle.stops, throttle.paused_seconds) == (1, 0, 4.0)
    assert throttle.last_reason == "the device is not charging"
    assert [record.getMessage() for record in caplog.records] == [
        "training pauses: the device is not charging",
        "training resumes after 4 s",
    ]


def test_hysteresis_at_the_limit() -> None:
    """A battery or temperature that varies around its limit causes only one pause."""
    device = SensorClock(replace(FINE, battery=0.39, celsius=81.0))
    levels = [(0.40, 81.0), (0.41, 79.0), (0.44, 76.0), (0.45, 76.0), (0.44, 74.0), (0.46, 74.0)]
    device.later = [device.set_later(battery=battery, celsius=celsius) for battery, celsius in levels]
    throttle = device.throttle()
    assert not throttle()
    assert device.later == []
    assert throttle.pauses == 1
    device.set_later(battery=0.41, celsius=79.0)()
    assert not throttle()
    assert throttle.pauses == 1


def test_successive_reasons_are_one_pause() -> None:
    device = SensorClock(replace(FINE, charging=False))
    device.later = [device.set_later(charging=True, celsius=90.0), device.set_later(celsius=60.0)]
    throttle = device.throttle()
    assert not throttle()
    assert (throttle.pauses, throttle.paused_seconds) == (1, 2.0)


def test_stop_after_max_wait() -> None:
    device = SensorClock(replace(FINE, charging=False))
    throttle = device.throttle(max_wait_seconds=2.5, poll_seconds=1.0)
    assert throttle()
    assert device.slept == [1.0, 1.0, 0.5]
    assert (throttle.pauses, throttle.stops, throttle.paused_seconds) == (1, 1, 2.5)
    assert throttle.last_reason == "the device is not charging; waited for 2 s"
    device.set_later(charging=True)()
    assert not throttle()


def test_no_wait_stops_immediately() -> None:
    device = SensorClock(replace(FINE, charging=False))
    assert device.throttle(max_wait_seconds=0.0)()
    assert device.slept == []


def test_memory_shortage_stops_also_during_pause() -> None:
    device = SensorClock(replace(FINE, free_mib=10.0))
    throttle = device.throttle()
    assert throttle()
    assert throttle.last_reason == "only 10 MiB of memory are free; training needs 150 MiB"
    assert device.slept == []
    device.set_later(free_mib=900.0, charging=False)()
    device.later = [device.set_later(free_mib=10.0)]
    assert throttle()
    assert (throttle.stops, throttle.pauses, throttle.paused_seconds) == (2, 1, 1.0)


def test_shutdown_ends_a_pause() -> None:
    """With the real clock and sleep: the event wakes the throttle an hour early."""
    stop, waits = threading.Event(), threading.Event()

    @contextmanager
    def pausing() -> Iterator[None]:
        waits.set()
        yield

    settings = node.ThrottleConfig(poll_seconds=3600.0, max_wait_seconds=3600.0)
    throttle = Throttle(settings, lambda: replace(FINE, charging=False), stop=stop, pausing=pausing)
    result: list[bool] = []
    thread = threading.Thread(target=lambda: result.append(throttle()))
    thread.start()
    assert waits.wait(60)
    stop.set()
    thread.join(60)
    assert result == [True]
    assert throttle()  # and afterwards
    assert throttle.last_reason == "the worker is shutting down"


def test_stop_event_overrides_fresh_reading() -> None:
    device = SensorClock(cost=0.001)
    throttle = device.throttle()
    assert not throttle()
    throttle.stop.set()
    assert throttle()
    assert device.readings == 1


def test_failing_sensors_pause_training() -> None:
    """E.g. a partial file: it pauses until there is a reading, then training continues."""
    answers: list[Conditions | Exception] = [OSError("half a file"), OSError("half a file"), FINE]

    def read() -> Conditions:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    device = SensorClock()
    throttle = Throttle(node.ThrottleConfig(), read, clock=lambda: device.seconds, sleep=device.sleep)
    assert not throttle()
    assert throttle.last_reason == "sensors can't be read (half a file)"
    assert throttle.paused_seconds == 2.0


def test_pausing_context_covers_the_pause() -> None:
    device, spans = SensorClock(replace(FINE, charging=False)), []

    @contextmanager
    def pausing() -> Iterator[None]:
        began = device.seconds
        yield
        spans.append((began, device.seconds))

    device.later = [lambda: None, device.set_later(charging=True)]
    throttle = Throttle(
        node.ThrottleConfig(), device.read, pausing=pausing, clock=lambda: device.seconds, sleep=device.sleep
    )
    assert not throttle()
    assert not throttle()
    assert spans == [(0.0, 2.0)]


@pytest.mark.parametrize("step", [0.001, 0.02, 0.4, 10.0])
@pytest.mark.parametrize("cost", [0.0001, 0.004, 0.1])
def test_sensor_interval_bounds_cost_and_delay(cost: float, step: float) -> None:
    """For any duration of readings and steps, a check is at most one step after the previous one."""
    device = SensorClock(cost=cost)
    throttle, steps = device.throttle(), 400
    for _ in range(steps):
        device.seconds += step
        assert not throttle()
    assert device.readings <= device.seconds / max(step, interval(cost)) + 1
    device.set_later(charging=False)()
    device.later = [device.set_later(charging=True)]
    pulled, asks = device.seconds, 0
    while not throttle.pauses:
        device.seconds += step
        asks += 1
        throttle()
    late = device.seconds - throttle.paused_seconds - pulled
    assert asks == 1 or late <= max(MAX_AGE, 10 * cost) + step + 2 * cost


@pytest.mark.parametrize(
    ("cost", "seconds"), [(0.0, 0.0), (0.0001, 0.005), (0.02, 1.0), (0.04, 2.0), (0.1, 2.0), (0.2, 2.0), (0.5, 5.0)]
)
def test_intervals(cost: float, seconds: float) -> None:
    assert interval(cost) == pytest.approx(seconds)
