"""Training history against a loop over rounds."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from strategies.round.history import TrainingHistory
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
ROUND = st.tuples(
    st.sets(st.sampled_from("abc")), st.none() | st.floats(0, 9, allow_nan=False), st.none() | st.floats(0, 2)
)
ROUNDS = st.lists(ROUND)


def make_metrics(number, names, epsilon, loss):
    """Make the metrics of a round; ε covers all rounds so far."""
    devices = {name: replace(ONE, last=number, epsilon=epsilon, events=number) for name in names}
    return replace(EMPTY, devices=devices, epsilon=epsilon, loss=loss)


@given(ROUNDS)
def test_restored_history_is_equal(rounds):
    history, rounds_metrics = TrainingHistory(), []
    for number, (names, epsilon, loss) in enumerate(rounds, 1):
        rounds_metrics.append(make_metrics(number, names, epsilon, loss))
        history = history.after_training(rounds_metrics[-1])
    for name in "abc":
        participated = [number for number, (names, *_) in enumerate(rounds, 1) if name in names]
        assert (name in history.devices) == bool(participated)
        if participated:
            metrics = history.devices[name]
            assert (metrics.asked, metrics.last, metrics.steps) == (
                len(participated),
                participated[-1],
                3 * len(participated),
            )
            assert history.events(name) == metrics.events <= participated[-1]
    assert history.losses == tuple(loss for *_, loss in rounds if loss is not None)
    restored = TrainingHistory.of(history.devices, [None, *rounds_metrics])
    assert (restored.devices, restored.losses) == (history.devices, history.losses)


def test_empty_history():
    assert TrainingHistory().events("a") == 0
    assert TrainingHistory().spent is None
