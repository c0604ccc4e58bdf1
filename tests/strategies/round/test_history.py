"""What a run knows of its devices, against a loop over its rounds."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from strategies.round.history import History
from strategies.round.metrics import DeviceMetrics, TrainMetrics

ONE = DeviceMetrics(rank=2, steps=3, bytes_down=5, bytes_up=7, seconds=1.0, joules=2.0, epsilon=None, asked=1)
EMPTY = TrainMetrics(
    asked=0,
    replied=0,
    loss=None,
    bytes_up=0,
    bytes_down=0,
    seconds=0.0,
    joules=0.0,
    epsilon=None,
    devices={},
    dropped={},
    diagnostics={},
)
TOLD = st.tuples(
    st.sets(st.sampled_from("abc")), st.none() | st.floats(0, 9, allow_nan=False), st.none() | st.floats(0, 2)
)
ROUNDS = st.lists(TOLD)


def facts(number, names, epsilon, loss):
    """Of one round, as `train_metrics` tells of them: ε is of all rounds so far."""
    devices = {name: replace(ONE, last=number, epsilon=epsilon, events=number) for name in names}
    return replace(EMPTY, devices=devices, epsilon=epsilon, loss=loss)


@given(ROUNDS)
def test_what_a_run_that_goes_on_remembers_is_what_it_had_learned(rounds):
    whole, told = History(), []
    for number, (names, epsilon, loss) in enumerate(rounds, 1):
        told.append(facts(number, names, epsilon, loss))
        whole.add_round(told[-1])
    for name in "abc":
        took_part = [number for number, (names, *_) in enumerate(rounds, 1) if name in names]
        assert (name in whole.devices) == bool(took_part)
        if took_part:
            known = whole.devices[name]
            assert (known.asked, known.last, known.steps) == (len(took_part), took_part[-1], 3 * len(took_part))
            assert whole.events(name) == known.events <= took_part[-1]
    assert whole.losses == [loss for *_, loss in rounds if loss is not None]
    again = History()
    again.remember(whole.devices, [None, *told])
    assert (again.devices, again.losses) == (whole.devices, whole.losses)


def test_nobody_told_of_anything():
    assert History().events("a") == 0
    assert History().spent is None
