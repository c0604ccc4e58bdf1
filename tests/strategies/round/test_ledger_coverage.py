"""No single device determines the guarantee of a run."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import PoissonGaussian, epsilon
from protocol import messages
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, Update
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.round.ledger_coverage import cap_epsilon, explained_epsilon
from tests.helpers.fleet import PLAN, FakeDevice, fresh_state, handle, perform, strategy

PRIVATE = replace(PLAN, privacy=ExamplePrivacy(noise_multiplier=2.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3))
GAIN = EvaluationPrivacy(noise_multiplier=9.0, clip=0.1, pictures=5, delta=1e-3)


@settings(max_examples=5)  # there are 20 cases, and each composes a ledger
@given(st.integers(0, 4), st.integers(0, 3))
def test_explained_epsilon_matches_a_full_ledger(rounds, evaluations):
    trained = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.5, steps=PLAN.steps)
    evaluation = PoissonGaussian(noise_multiplier=9.0, sampling_rate=1.0, steps=1)
    expected = epsilon([trained] * rounds + [evaluation] * evaluations, 1e-3).value
    assert explained_epsilon(PRIVATE, rounds=rounds, evaluation=GAIN, evaluations=evaluations) == expected
    assert explained_epsilon(PLAN, rounds=rounds, evaluation=None, evaluations=0) is None


@pytest.mark.parametrize("reported", [9e11, 50.0])
def test_excessive_report_sets_no_guarantee(monkeypatch, tmp_path, reported):
    """The report may be false or include other federations; the server does not need to distinguish these."""
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)

    def misbehave(reply: messages.Reply) -> messages.Reply:
        return replace(reply, epsilon=reported) if isinstance(reply, Update) else reply

    state = run_rounds(
        grid=CohortGrid([FakeDevice("a", misbehave=misbehave), FakeDevice("b"), FakeDevice("c")], perform),
        strategy=strategy(plan=PRIVATE, accept_simulated=True),
        state=fresh_state(private=True),
        rounds=2,
        checkpoints=tmp_path,
        on_round=lambda _: None,
    )
    for done in state.history[1:]:
        limit = explained_epsilon(PRIVATE, rounds=done.number, evaluation=None, evaluations=0)
        assert (done.train.replied, done.train.told) == (3, reported)
        assert [guarantee.value for guarantee in done.guarantees] == [done.epsilon] == [limit]
        strict = explained_epsilon(PRIVATE, rounds=done.number, evaluation=None, evaluations=0, delta=1e-5)
        assert [guarantee.strict for guarantee in done.guarantees] == [strict]
    assert state.devices["a"].epsilon == limit
    assert state.devices["b"].epsilon <= 1.5  # its report


def test_cap_without_report_or_limit():
    assert (cap_epsilon(None, 1.0), cap_epsilon(2.0, None), cap_epsilon(2.0, 1.0), cap_epsilon(0.5, 1.0)) == (
        None,
        2.0,
        1.0,
        0.5,
    )
