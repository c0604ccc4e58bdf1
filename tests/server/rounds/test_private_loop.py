"""Charged rounds: aborted, resumed, and ended before the budget is exceeded."""

import json
import logging
from dataclasses import replace

import pytest

from common.errors import AntherError
from models.lora.adapter import to_tensors
from privacy.accounting import DEVICE, PoissonGaussian, epsilon, with_strict
from privacy.central import AdaptiveClip, GaussianMechanism
from protocol.tensor_codec import encode
from server.ledger import JOURNAL
from server.rounds import checkpoint
from server.rounds.federation import federate
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from tests.helpers.central import BUDGET, EXPECTED, Z, poisson, private
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN, SITES, FakeDevice, fresh_state, handle, perform

SECRET = {"budget": replace(BUDGET, participations=None), "sampling_rate": 0.5}


class _Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def _fake_logic(monkeypatch):
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)


def run(folder, *, rounds=3, resume=False, on_round=lambda _: None, kill=None, **strategy):
    """Run three devices; in round `kill`, device `a` fails and kills the server."""
    rounds_seen = []

    def die(reply):
        if type(reply).__name__ == "Update":
            rounds_seen.append(reply.round)
            if reply.round == kill:
                raise _Killed
        return reply

    grid = CohortGrid([FakeDevice("a", misbehave=die), FakeDevice("b"), FakeDevice("c")], perform)
    saved = checkpoint.load(folder / "checkpoints", sites=SITES) if resume else None
    return run_rounds(
        grid=grid,
        strategy=private(folder, **strategy),
        state=saved or fresh_state(private=True),
        rounds=rounds,
        checkpoints=folder / "checkpoints",
        on_round=on_round,
    )


def spent(rounds, rate=1.0):
    events = [PoissonGaussian(noise_multiplier=Z, sampling_rate=rate, steps=rounds)]
    return with_strict(epsilon(events, BUDGET.delta, DEVICE), events)


def states(folder):
    return [(event["state"], event["round"]) for event in map(json.loads, (folder / JOURNAL).read_text().splitlines())]


def test_rounds_are_reserved_and_released(tmp_path):
    state = run(tmp_path)
    assert states(tmp_path) == [(kind, number) for number in (1, 2, 3) for kind in ("reserved", "released")]
    assert [done.train.central.guarantee for done in state.history[1:]] == [spent(rounds) for rounds in (1, 2, 3)]
    assert state.best_round == 3  # fixed in advance
    assert checkpoint.load(tmp_path / "checkpoints", sites=SITES).ledger == state.ledger


def test_aborted_round_stays_charged(tmp_path, caplog):
    """Every device is asked in every round, and σ is calibrated for three."""
    with pytest.raises(_Killed):
        run(tmp_path, kill=2)
    with caplog.at_level(logging.WARNING):
        state = run(tmp_path, resume=True)
    assert states(tmp_path) == [
        ("reserved", 1),
        ("released", 1),
        ("reserved", 2),
        ("reserved", 2),
        ("released", 2),
    ]
    assert state.round == 2
    assert "the run ends after round 2 of 3: every device was selected in 3 rounds" in caplog.text
    assert state.history[2].train.central.guarantee == spent(3)
    again = run(tmp_path, resume=True)  # and doesn't continue
    assert encode(to_tensors(again.adapter)) == encode(to_tensors(state.adapter))
    assert len(states(tmp_path)) == 5


def test_aborted_secret_sample_charges_all_devices(tmp_path, caplog):
    level = {**SECRET, "budget": replace(SECRET["budget"], epsilon=spent(3, 0.5).value)}
    settings = {"level": level, "selection": poisson(0.5)}
    whole = run(tmp_path / "whole", **settings)
    assert whole.round == 3
    broken = next(number for number in (1, 2, 3) if "a" in poisson(0.5).select("abc", draw=number))
    with pytest.raises(_Killed):
        run(tmp_path / "parts", kill=broken, **settings)
    with caplog.at_level(logging.WARNING):
        state = run(tmp_path / "parts", resume=True, **settings)
    assert state.round == 2
    assert "the run ends after round 2 of 3: round 3 would bring a device to ε=" in caplog.text
    assert [kind for kind, _ in states(tmp_path / "parts")].count("reserved") == 3


@pytest.mark.parametrize("dies_after", [0, 1, 2])
def test_kill_between_rounds_changes_nothing(tmp_path, dies_after):
    """No round was aborted, so none is charged twice; a missing release is recorded."""
    adaptive = AdaptiveClip(quantile=0.5, rate=0.5, noise_stddev=1.0)
    level = {"mechanism": GaussianMechanism(noise_multiplier=Z, expected=EXPECTED, adaptive=adaptive)}
    whole = run(tmp_path / "whole", level=level)

    def die(done):
        if done.number == dies_after:
            raise _Killed

    with pytest.raises(_Killed):
        run(tmp_path / "parts", on_round=die, level=level)
    journal = tmp_path / "parts" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    if dies_after:
        journal.write_bytes(b"".join(lines[:-1]))
    resumed = run(tmp_path / "parts", resume=True, level=level)
    assert encode(to_tensors(resumed.adapter)) == encode(to_tensors(whole.adapter))
    assert [d.train.central for d in resumed.history[1:]] == [d.train.central for d in whole.history[1:]]
    assert states(tmp_path / "parts") == states(tmp_path / "whole")
    central = [done.train.central for done in resumed.history[1:]]
    assert [facts.clip for facts in central[1:]] == [facts.next_clip for facts in central[:-1]]
    assert len({facts.clip for facts in central}) == 3


@pytest.mark.parametrize("how", ["missing", "shortened"])
def test_missing_ledger_prevents_resume(tmp_path, how):
    run(tmp_path, rounds=2)
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:1] if how == "shortened" else []))
    with pytest.raises(AntherError, match=r"ledger\.jsonl: contains \d of the 3 events that the checkpoint names"):
        run(tmp_path, rounds=3, resume=True)


def test_central_dp_run_keeps_last_round(tmp_path):
    grid = CohortGrid([FakeDevice("a"), FakeDevice("b")], perform)
    state = federate(
        compose("rounds=1 adapter.shared.rank=3"),
        grid=grid,
        strategy=private(tmp_path),
        plan=PLAN,
        saved=None,
        checkpoints=tmp_path / "checkpoints",
        on_round=lambda _: None,
    )
    assert PLAN.privacy is None
    assert state.private


def test_budget_below_one_round(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        state = run(tmp_path, level={"budget": replace(BUDGET, epsilon=0.01)})
    assert (state.round, states(tmp_path)) == (0, [])
    assert "the run ends after round 0 of 3" in caplog.text
