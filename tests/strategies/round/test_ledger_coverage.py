"""What is promised of a run is not any one device's to set."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import PoissonGaussian, epsilon
from protocol import messages
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, Update
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.round.ledger_coverage import clipped, explained
from tests.helpers.fleet import PLAN, FakeDevice, fresh_state, handle, perform, strategy

PRIVATE = replace(PLAN, privacy=ExamplePrivacy(noise_multiplier=2.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3))
GAIN = EvaluationPrivacy(noise_multiplier=9.0, clip=0.1, pictures=5, delta=1e-3)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 4), st.integers(0, 3))
def test_it_is_what_the_ledger_of_whoever_took_part_in_everything_holds(rounds, measured):
    trained = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.5, steps=PLAN.steps)
    gains = PoissonGaussian(noise_multiplier=9.0, sampling_rate=1.0, steps=1)
    held = epsilon([trained] * rounds + [gains] * measured, 1e-3).value
    assert explained(PRIVATE, rounds=rounds, measuring=GAIN, measured=measured) == held
    assert explained(PLAN, rounds=rounds, measuring=None, measured=0) is None


@pytest.mark.parametrize("lie", [9e11, 50.0])
def test_a_device_that_tells_more_sets_no_guarantee(monkeypatch, tmp_path, lie):
    """A lie, or the honest history of other federations: nobody here can tell them apart, and need not."""
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)

    def tells(reply: messages.Reply) -> messages.Reply:
        return replace(reply, epsilon=lie) if isinstance(reply, Update) else reply

    found = run_rounds(
        grid=CohortGrid([FakeDevice("a", misbehave=tells), FakeDevice("b"), FakeDevice("c")], perform),
        strategy=strategy(plan=PRIVATE, accept_simulated=True),
        state=fresh_state(private=True),
        rounds=2,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    for done in found.history[1:]:
        most = explained(PRIVATE, rounds=done.number, measuring=None, measured=0)
        assert (done.train.replied, done.train.told) == (3, lie)
        assert [guarantee.value for guarantee in done.guarantees] == [done.epsilon] == [most]
        strict = explained(PRIVATE, rounds=done.number, measuring=None, measured=0, delta=1e-5)
        assert [guarantee.strict for guarantee in done.guarantees] == [strict]
    assert found.devices["a"].epsilon == most
    assert found.devices["b"].epsilon <= 1.5  # what it told


def test_nothing_told_or_explained():
    assert (clipped(None, 1.0), clipped(2.0, None), clipped(2.0, 1.0), clipped(0.5, 1.0)) == (None, 2.0, 1.0, 0.5)
