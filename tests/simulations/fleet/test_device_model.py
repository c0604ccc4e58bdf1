"""Batteries, heat and habits, compared with small time steps and conservation of energy."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.units import HOUR
from simulations.fleet.availability import DAY, DailySchedule
from simulations.fleet.battery import charge_after, flow, seconds_until
from simulations.fleet.device_model import FLAT, LEFT, WAKE_CHARGE, DeviceState, PowerModel, advance
from simulations.fleet.heat import Heat, heat_after, seconds_until_change

WATTS = st.floats(-50, 50)
ALWAYS = DailySchedule([0.0, 24.0], [0.0, 24.0])
NEVER = DailySchedule([], [])


@given(st.floats(0, 60), WATTS, st.floats(0, 1e5))
def test_charge_is_conserved_within_bounds(charge, watts, seconds):
    after = charge_after(charge, watts, seconds, capacity=60.0)
    assert 0 <= after <= 60
    put_in = watts * seconds / HOUR
    if 0 < charge + put_in < 60:
        assert after - charge == pytest.approx(put_in, abs=1e-9)
    assert (after - charge) * watts >= 0


@given(st.floats(0, 60), st.floats(0, 60), WATTS)
def test_time_until_a_level(level, charge, watts):
    seconds = seconds_until(level, charge, watts)
    if seconds < 1e9:
        assert charge + watts * seconds / HOUR == pytest.approx(level, abs=1e-6)
    else:
        assert (level - charge) * watts <= 0 or abs(watts) < 1e-3


@given(st.floats(0, 1), st.booleans(), st.booleans(), st.floats(0, 5000))
def test_heat_rises_at_work_and_falls_at_rest(level, hot, working, seconds):
    limits = {"throttle_after": 900.0, "cooldown": 600.0}
    after = heat_after(Heat(level, hot), seconds, working=working, **limits)
    assert 0 <= after.level <= 1
    assert (after.level - level) * (1 if working else -1) >= 0
    until = seconds_until_change(Heat(level, hot), working=working, **limits)
    if math.isfinite(until):
        changed = heat_after(Heat(level, hot), until + 1e-6, working=working, **limits)
        assert changed.hot != hot or level == 0  # a cool device is not hot
    assert heat_after(Heat(), seconds, working=True, throttle_after=None, cooldown=1.0) == Heat()


BODIES = st.builds(
    PowerModel,
    watts_idle=st.floats(0.1, 5),
    watts_busy=st.floats(5, 20),
    capacity=st.floats(1, 50),
    charger=st.sampled_from([0.0, 3.0, 30.0]),
    throttle_after=st.none() | st.floats(60, 2000),
    cooldown=st.floats(60, 2000),
    throttled_speed=st.floats(0.2, 1),
)
HABITS = st.builds(
    DailySchedule,
    st.sampled_from([[22.0, 7.0], [], [0.0, 24.0], [8.0, 12.0, 13.0, 20.0]]),
    st.sampled_from([[23.0, 6.0], [0.0, 24.0]]),
    phase=st.floats(-DAY, DAY),
    jitter=st.just(1800.0),
    seed=st.integers(0, 5),
)


@given(BODIES, HABITS, st.floats(0, 1), st.floats(10, 20_000), st.booleans())
def test_work_and_energy_add_up(power_model, availability, charged, work, interruptible):
    start = DeviceState(time=3 * DAY, charge=charged * power_model.capacity)
    done = advance(power_model, availability, start, work=work, interruptible=interruptible)
    worked, lasted = work - done.remaining_work, done.state.time - start.time
    assert 0 <= worked <= work
    assert done.abort_reason or done.remaining_work == 0
    # Above idle power, work takes the same energy at every speed.
    drawn = power_model.watts_idle * lasted + (power_model.watts_busy - power_model.watts_idle) * worked
    assert done.joules == pytest.approx(drawn, rel=1e-6, abs=1e-2)
    assert worked - 1e-3 <= lasted <= worked / power_model.throttled_speed + 1e-3
    assert (done.state.charge - start.charge) * HOUR <= power_model.charger * lasted + 1e-3  # energy is conserved
    assert 0 <= done.drained <= done.joules + 1e-3
    if not power_model.charger:
        assert done.drained == pytest.approx(done.joules, rel=1e-6, abs=0.05)
        spent = (start.charge - done.state.charge) * HOUR
        assert spent == pytest.approx(done.joules, rel=1e-6, abs=0.05)
    if done.abort_reason == FLAT:
        assert done.state.off
        assert done.state.charge < WAKE_CHARGE * power_model.capacity
    assert interruptible or done.abort_reason != LEFT


@given(BODIES, HABITS, st.floats(0, 1), st.floats(100, 3 * DAY))
def test_state_does_not_depend_on_sampling(power_model, availability, charged, seconds):
    assume(abs(seconds - power_model.cooldown) > 1e-3)  # at the exact end rounding decides whether it is cool
    start = DeviceState(time=0.0, charge=charged * power_model.capacity, heat=Heat(1.0, True))
    whole = advance(power_model, availability, start, until=seconds)
    state, joules = start, 0.0
    for part in range(1, 40):
        state, drawn, *_ = advance(power_model, availability, state, until=seconds * part / 39)
        joules += drawn
    assert state.charge == pytest.approx(whole.state.charge, abs=1e-4)
    assert (state.off, state.heat.hot) == (whole.state.off, whole.state.heat.hot)
    assert joules == pytest.approx(whole.joules, rel=1e-4, abs=0.1)


def test_throttled_phone_matches_small_steps():
    power_model = PowerModel(
        watts_idle=0.5,
        watts_busy=3.5,
        capacity=18.0,
        charger=2.0,
        throttle_after=500.0,
        cooldown=300.0,
        throttled_speed=0.5,
    )
    availability = DailySchedule([0.0, 0.25], [0.0, 24.0])
    done = advance(power_model, availability, DeviceState(0.0, 9.0), work=2000.0)
    time, charge, level, hot, remaining_work, step = 0.0, 9.0, 0.0, False, 2000.0, 0.05
    while remaining_work > 0:
        speed = 0.5 if hot else 1.0
        drawn = 0.5 + speed * 3.0
        charge += ((2.0 if time < 900 else 0.0) - drawn) * step / 3600
        level = min(level + step / 500, 1.0)
        hot = hot or level >= 1
        remaining_work, time = remaining_work - speed * step, time + step
    assert done.state.time == pytest.approx(time, abs=0.2)
    assert done.state.charge == pytest.approx(charge, abs=1e-3)
    assert done.state.heat.hot


def test_flat_device_returns_after_charging():
    power_model = PowerModel(watts_idle=1.0, watts_busy=5.0, capacity=10.0, charger=5.0)
    evening = DailySchedule([20.0, 24.0], [0.0, 24.0])
    done = advance(power_model, evening, DeviceState(0.0, 1.0), work=3600.0)
    assert done.abort_reason == FLAT
    assert done.state.time == pytest.approx(720.0, abs=0.1)
    later = advance(power_model, evening, done.state, until=20 * 3600.0).state
    assert (later.off, later.charge) == (True, 0.0)
    woken = 20 * 3600 + WAKE_CHARGE * 10 / 5 * 3600
    assert advance(power_model, evening, later, until=woken - 1).state.off
    assert not advance(power_model, evening, later, until=woken + 1).state.off


def test_interruptible_device_aborts_when_used():
    power_model = PowerModel(watts_idle=1.0, watts_busy=5.0)
    availability = DailySchedule([0.0, 24.0], [0.0, 1.0])
    assert advance(power_model, availability, DeviceState(0.0), work=7200.0, interruptible=True).abort_reason == LEFT
    assert advance(power_model, availability, DeviceState(0.0), work=7200.0).abort_reason == ""
    assert (
        advance(power_model, availability, DeviceState(5000.0), work=7200.0, interruptible=True).abort_reason == ""
    )  # it was in use at the start
    assert advance(power_model, NEVER, DeviceState(0.0), work=7200.0).abort_reason == FLAT  # no battery, no plug
    assert advance(power_model, ALWAYS, DeviceState(0.0), until=50.0, on_task=True).joules == pytest.approx(50.0)
    assert flow(2.0, plugged=True, charger=5.0) == 3.0
