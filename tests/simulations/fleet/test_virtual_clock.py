"""Virtual clock: events in order, and monotonic time."""

from hypothesis import given
from hypothesis import strategies as st

from simulations.fleet.virtual_clock import MAX_WAIT, VirtualClock


@given(st.lists(st.tuples(st.floats(0, 1e5), st.booleans())), st.lists(st.floats(0, 2e4), max_size=20))
def test_events_run_once_in_order(events, waits):
    clock, seen = VirtualClock(), []
    for index, (time, ends) in enumerate(events):
        clock.schedule(time, lambda time=time, index=index, ends=ends: seen.append((time, index, clock.now())) or ends)
    before = clock.now()
    for wait in waits:
        clock.wait(clock.now() + wait)
        assert before <= clock.now() <= before + min(wait, MAX_WAIT)
        before = clock.now()
    assert [event[:2] for event in seen] == sorted(event[:2] for event in seen)
    assert all(time == now for time, _, now in seen)
    due = [time for time, _ in events if time < clock.now()]
    assert len(due) <= len(seen) <= len(events)


def test_event_can_end_the_wait():
    clock = VirtualClock()
    clock.resume(5.0)
    clock.schedule(7.0, lambda: False)
    clock.schedule(8.0, lambda: True)
    clock.schedule(1.0, lambda: False)  # already past: runs at once
    clock.wait(100.0)
    assert clock.now() == 8.0
    clock.wait(3.0)  # already past
    assert clock.now() == 8.0


def test_event_can_schedule_another():
    clock, seen = VirtualClock(), []

    def first():
        clock.schedule(clock.now() + 1.0, lambda: seen.append(clock.now()) or False)
        return False

    clock.schedule(1.0, first)
    clock.wait(10.0)
    assert (seen, clock.now()) == ([2.0], 10.0)
