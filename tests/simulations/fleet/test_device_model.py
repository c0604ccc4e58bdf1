"""Batteries, heat and habits, against small steps of time and what physics forbids."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.units import HOUR
from simulations.fleet.availability import DAY, DailySchedule
from simulations.fleet.battery import charge_after, flow, seconds_until
from simulations.fleet.device_model import FLAT, LEFT, WAKE_CHARGE, DeviceState, PowerModel, live
from simulations.fleet.heat import Heat, heat_after, seconds_until_change

WATTS = st.floats(-50, 50)
ALWAYS = DailySchedule([0.0, 24.0], [0.0, 24.0])
NEVER = DailySchedule([], [])


@given(st.floats(0, 60), WATTS, st.floats(0, 1e5))
def test_a_battery_keeps_what_goes_in_within_its_bounds(charge, watts, seconds):
    after = charge_after(charge, watts, seconds, capacity=60.0)
    assert 0 <= after <= 60
    put_in = watts * seconds / HOUR
    if 0 < charge + put_in < 60:
        assert after - charge == pytest.approx(put_in, abs=1e-9)
    assert (after - charge) * watts >= 0


@given(st.floats(0, 60), st.floats(0, 60), WATTS)
def test_the_moment_at_which_a_level_is_reached(level, charge, watts):
    seconds = seconds_until(level, charge, watts)
    if seconds < 1e9:
        assert charge + watts * seconds / HOUR == pytest.approx(level, abs=1e-6)
    else:
        assert (level - charge) * watts <= 0 or abs(watts) < 1e-3


@given(st.floats(0, 1), st.booleans(), st.booleans(), st.floats(0, 5000))
def test_heat_rises_at_work_and_falls_at_rest(level, hot, working, seconds):
    limits = {"hot_after": 900.0, "cool_after": 600.0}
    after = heat_after(Heat(level, hot), seconds, working=working, **limits)
    assert 0 <= after.level <= 1
    assert (after.level - level) * (1 if working else -1) >= 0
    until = seconds_until_change(Heat(level, hot), working=working, **limits)
    if math.isfinite(until):
        changed = heat_after(Heat(level, hot), until + 1e-6, working=working, **limits)
        assert changed.hot != hot or level == 0  # what is cold is not hot
    assert heat_after(Heat(), seconds, working=True, hot_after=None, cool_after=1.0) == Heat()


BODIES = st.builds(
    PowerModel,
    watts_idle=st.floats(0.1, 5),
    watts_busy=st.floats(5, 20),
    capacity=st.floats(1, 50),
    charger=st.sampled_from([0.0, 3.0, 30.0]),
    hot_after=st.none() | st.floats(60, 2000),
    cool_after=st.floats(60, 2000),
    hot_speed=st.floats(0.2, 1),
)
HABITS = st.builds(
    DailySchedule,
    st.sampled_from([[22.0, 7.0], [], [0.0, 24.0], [8.0, 12.0, 13.0, 20.0]]),
    st.sampled_from([[23.0, 6.0], [0.0, 24.0]]),
    phase=st.floats(-DAY, DAY),
    jitter=st.just(1800.0),
    seed=st.integers(0, 5),
)


@settings(max_examples=60)
@given(BODIES, HABITS, st.floats(0, 1), st.floats(10, 20_000), st.booleans())
def test_work_and_energy_add_up(body, hours, charged, work, leaves):
    start = DeviceState(time=3 * DAY, charge=charged * body.capacity)
    done = live(body, hours, start, work=work, leaves=leaves)
    worked, lasted = work - done.left, done.state.time - start.time
    assert 0 <= worked <= work
    assert done.abort_reason or done.left == 0
    # Work draws the same whatever the speed, beyond what being on draws.
    drawn = body.watts_idle * lasted + (body.watts_busy - body.watts_idle) * worked
    assert done.joules == pytest.approx(drawn, rel=1e-6, abs=1e-2)
    assert worked - 1e-3 <= lasted <= worked / body.hot_speed + 1e-3
    assert (done.state.charge - start.charge) * HOUR <= body.charger * lasted + 1e-3  # nothing comes from nowhere
    assert 0 <= done.drained <= done.joules + 1e-3
    if not body.charger:
        assert done.drained == pytest.approx(done.joules, rel=1e-6, abs=0.05)
        spent = (start.charge - done.state.charge) * HOUR
        assert spent == pytest.approx(done.joules, rel=1e-6, abs=0.05)
    if done.abort_reason == FLAT:
        assert done.state.off
        assert done.state.charge < WAKE_CHARGE * body.capacity
    assert leaves or done.abort_reason != LEFT


@settings(max_examples=20, deadline=None)
@given(BODIES, HABITS, st.floats(0, 1), st.floats(100, 3 * DAY))
def test_a_life_is_the_same_however_often_one_looks(body, hours, charged, seconds):
    assume(abs(seconds - body.cool_after) > 1e-3)  # at the very end rounding decides whether it is cool
    start = DeviceState(time=0.0, charge=charged * body.capacity, heat=Heat(1.0, True))
    whole = live(body, hours, start, until=seconds)
    state, joules = start, 0.0
    for part in range(1, 40):
        state, drawn, *_ = live(body, hours, state, until=seconds * part / 39)
        joules += drawn
    assert state.charge == pytest.approx(whole.state.charge, abs=1e-4)
    assert (state.off, state.heat.hot) == (whole.state.off, whole.state.heat.hot)
    assert joules == pytest.approx(whole.joules, rel=1e-4, abs=0.1)


def test_a_hot_phone_against_small_steps():
    body = PowerModel(
        watts_idle=0.5, watts_busy=3.5, capacity=18.0, charger=2.0, hot_after=500.0, cool_after=300.0, hot_speed=0.5
    )
    hours = DailySchedule([0.0, 0.25], [0.0, 24.0])
    done = live(body, hours, DeviceState(0.0, 9.0), work=2000.0)
    time, charge, level, hot, left, step = 0.0, 9.0, 0.0, False, 2000.0, 0.05
    while left > 0:
        speed = 0.5 if hot else 1.0
        drawn = 0.5 + speed * 3.0
        charge += ((2.0 if time < 900 else 0.0) - drawn) * step / 3600
        level = min(level + step / 500, 1.0)
        hot = hot or level >= 1
        left, time = left - speed * step, time + step
    assert done.state.time == pytest.approx(time, abs=0.2)
    assert done.state.charge == pytest.approx(charge, abs=1e-3)
    assert done.state.heat.hot


def test_who_is_flat_comes_back_when_it_was_charged_a_little():
    body = PowerModel(watts_idle=1.0, watts_busy=5.0, capacity=10.0, charger=5.0)
    evening = DailySchedule([20.0, 24.0], [0.0, 24.0])
    done = live(body, evening, DeviceState(0.0, 1.0), work=3600.0)
    assert done.abort_reason == FLAT
    assert done.state.time == pytest.approx(720.0, abs=0.1)
    later = live(body, evening, done.state, until=20 * 3600.0).state
    assert (later.off, later.charge) == (True, 0.0)
    woken = 20 * 3600 + WAKE_CHARGE * 10 / 5 * 3600
    assert live(body, evening, later, until=woken - 1).state.off
    assert not live(body, evening, later, until=woken + 1).state.off


def test_who_is_unplugged_or_used_breaks_off_and_only_then():
    body = PowerModel(watts_idle=1.0, watts_busy=5.0)
    hours = DailySchedule([0.0, 24.0], [0.0, 1.0])
    assert live(body, hours, DeviceState(0.0), work=7200.0, leaves=True).abort_reason == LEFT
    assert live(body, hours, DeviceState(0.0), work=7200.0).abort_reason == ""
    assert (
        live(body, hours, DeviceState(5000.0), work=7200.0, leaves=True).abort_reason == ""
    )  # it was used from the first
    assert live(body, NEVER, DeviceState(0.0), work=7200.0).abort_reason == FLAT  # no battery, no plug
    assert live(body, ALWAYS, DeviceState(0.0), until=50.0, at_task=True).joules == pytest.approx(50.0)
    assert flow(2.0, plugged=True, charger=5.0) == 3.0
