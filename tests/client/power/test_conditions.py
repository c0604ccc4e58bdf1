"""Merging and caching of sensor readings."""

from __future__ import annotations

import math

from client.power.conditions import ESTIMATE, Conditions, cached_for, combined


def test_no_readings_give_unknown() -> None:
    assert combined() == combined(Conditions(), Conditions()) == Conditions()
    assert Conditions().free_mib == math.inf


def test_merging_of_readings() -> None:
    one = Conditions(
        charging=False, battery=0.0, celsius=40.0, battery_celsius=31.0, throttled=False, free_mib=300, metered=False
    )
    other = Conditions(
        charging=True, celsius=60.0, throttled=True, free_mib=200, owner_active=True, watts=3.0, watts_quality=ESTIMATE
    )
    assert combined(Conditions(), one, other) == Conditions(
        charging=False,
        battery=0.0,
        celsius=60.0,
        battery_celsius=31.0,
        throttled=True,
        free_mib=200,
        owner_active=True,
        metered=False,
        watts=3.0,
        watts_quality=ESTIMATE,
    )
    assert combined(one, Conditions()).throttled is False


def test_cached_reading() -> None:
    now, readings = [0.0], []

    def read() -> Conditions:
        readings.append(now[0])
        return Conditions(celsius=now[0])

    reading = cached_for(read, 2.0, lambda: now[0])
    result = []
    for now[0] in (0.0, 1.9, 2.0, 3.9, 10.0):
        result.append(reading().celsius)
    assert result == [0.0, 0.0, 2.0, 2.0, 10.0]
    assert readings == [0.0, 2.0, 10.0]
