"""A virtual clock: events in the order of their times, and time that never runs backwards."""

from hypothesis import given
from hypothesis import strategies as st

from simulations.fleet.virtual_clock import MAX_WAIT, VirtualClock


@given(st.lists(st.tuples(st.floats(0, 1e5), st.booleans())), st.lists(st.floats(0, 2e4), max_size=20))
def test_events_happen_once_in_order_and_time_only_rises(events, waits):
    clock, seen = VirtualClock(), []
    for place, (time, worth) in enumerate(events):
        clock.schedule(
            time, lambda time=time, place=place, worth=worth: seen.append((time, place, clock.now())) or worth
        )
    before = clock.now()
    for wait in waits:
        clock.wait(clock.now() + wait)
        assert before <= clock.now() <= before + min(wait, MAX_WAIT)
        before = clock.now()
    assert [event[:2] for event in seen] == sorted(event[:2] for event in seen)
    assert all(time == now for time, _, now in seen)
    due = [time for time, _ in events if time < clock.now()]
    assert len(due) <= len(seen) <= len(events)


def test_an_event_worth_a_look_ends_the_wait():
    clock = VirtualClock()
    clock.resume(5.0)
    clock.schedule(7.0, lambda: False)
    clock.schedule(8.0, lambda: True)
    clock.schedule(1.0, lambda: False)  # over already: at once
    clock.wait(100.0)
    assert clock.now() == 8.0
    clock.wait(3.0)  # over already
    assert clock.now() == 8.0


def test_an_event_may_make_another():
    clock, seen = VirtualClock(), []

    def first():
        clock.schedule(clock.now() + 1.0, lambda: seen.append(clock.now()) or False)
        return False

    clock.schedule(1.0, first)
    clock.wait(10.0)
    assert (seen, clock.now()) == ([2.0], 10.0)
