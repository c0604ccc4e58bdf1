"""The server's ledger: charged before a round, never refunded, and checked against checkpoints."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from privacy.accounting import DEVICE, PoissonGaussian, epsilon, with_strict
from privacy.ledger.entries import MEASURE
from privacy.storage import FileStorage
from server.ledger import JOURNAL, ServerLedger, spent_guarantee
from strategies.central_dp import BudgetExhausted, Charge, DeviceBudget

ROUND = PoissonGaussian(noise_multiplier=4.0, sampling_rate=1.0, steps=1)
SECRET = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.1, steps=1)
MEASURED = PoissonGaussian(noise_multiplier=10.0, sampling_rate=1.0, steps=3)
BUDGET = DeviceBudget(epsilon=8.0, delta=1e-3, participations=5)


def charge(round=1, asked=("a", "b"), mechanism=ROUND, **changes):
    return Charge(
        run="run",
        round=round,
        mechanism=mechanism,
        clip=0.5,
        expected=10.0,
        adapter="f" * 64,
        asked=asked,
        release=False,
        **changes,
    )


def guarantee(*events):
    return with_strict(epsilon(events, BUDGET.delta, DEVICE), events)


def guarantee_after(count, mechanism=ROUND):
    return guarantee(replace(mechanism, steps=count))


@pytest.fixture
def ledger(tmp_path):
    return ServerLedger(FileStorage(tmp_path))


def test_charge_is_written(ledger, tmp_path):
    assert ledger.reserve(charge(), BUDGET) == guarantee_after(1)
    assert ledger.charges() == [charge()]
    event = json.loads((tmp_path / JOURNAL).read_text())
    expected = {
        "state": "reserved",
        "run": "run",
        "round": 1,
        "clip": 0.5,
        "expected": 10.0,
        "adapter": "f" * 64,
        "asked": ["a", "b"],
        "release": False,
        "unit": "device",
        "relation": "add_or_remove_one",
        "purpose": "train",
        "mechanism": {"noise_multiplier": 4.0, "sampling_rate": 1.0, "steps": 1},
    }
    assert {key: event[key] for key in expected} == expected


def test_secret_sample_stores_no_names(ledger, tmp_path):
    ledger.reserve(charge(asked=None, mechanism=SECRET), replace(BUDGET, participations=None))
    assert json.loads((tmp_path / JOURNAL).read_text())["asked"] is None
    assert ledger.participations() == {}


def test_epsilon_against_observer_of_the_sample(ledger):
    """For a device that was asked in every round: without sampling, and with evaluation."""
    budget = replace(BUDGET, participations=None, other_releases=(MEASURED,))
    for number in range(3):
        spent = ledger.reserve(charge(number, None, SECRET), budget)
    assert spent.value == guarantee(replace(SECRET, steps=3), MEASURED).value
    assert spent.seen == epsilon([replace(SECRET, sampling_rate=1.0, steps=3), MEASURED], budget.delta).value
    assert spent.seen > spent.value
    assert str(spent).endswith(f"; ε={spent.seen:.3g} if the network sees who was asked)")
    assert ledger.reserve(charge(9, ("a",)), BUDGET).seen is not None  # earlier samples still count
    assert spent_guarantee([charge()], BUDGET).seen is None


def test_repeated_round_is_charged_again(ledger):
    ledger.reserve(charge(), BUDGET)
    assert ledger.reserve(charge(), BUDGET) == guarantee_after(2)
    ledger.release("run", 1)
    assert ledger.reserve(charge(), BUDGET) == guarantee_after(3)
    assert ledger.participations() == {"a": 3, "b": 3}


def test_device_pays_for_its_rounds(ledger):
    ledger.reserve(charge(1, ("a",)), BUDGET)
    ledger.reserve(charge(2, ("b",)), BUDGET)
    assert ledger.reserve(charge(3, ("b", "c")), BUDGET) == guarantee_after(2)


def test_round_over_budget_is_not_written(ledger, tmp_path):
    budget = replace(BUDGET, epsilon=guarantee_after(2).value)
    for number in (1, 2):
        ledger.reserve(charge(number), budget)
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(BudgetExhausted, match=r"round 3 would bring a device to ε=.* per device .* may spend ε="):
        ledger.reserve(charge(3), budget)
    assert (tmp_path / JOURNAL).read_bytes() == before
    assert ledger.reserve(charge(3, ("c",)), budget) == guarantee_after(
        2
    )  # a device that wasn't asked yet has its whole budget


def test_release_is_recorded_once(ledger, tmp_path):
    ledger.release("run", 1)  # without a reservation
    ledger.reserve(charge(), BUDGET)
    for _ in range(2):
        ledger.release("run", 1)
    states = [json.loads(line)["state"] for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert states == ["reserved", "released"]
    assert ledger.charges() == [charge()]


HISTORIES = st.lists(st.sets(st.sampled_from("abcd")), max_size=6)


@given(HISTORIES, st.integers(0, 3))
def test_spent_guarantee_matches_reference(asked, measured):
    charges = [charge(number, tuple(sorted(names))) for number, names in enumerate(asked)]
    charges += [charge(number, None, replace(MEASURED, steps=1), purpose=MEASURE) for number in range(measured)]
    most = max((sum(name in names for names in asked) for name in "abcd"), default=0)
    expected = guarantee(MEASURED, *[ROUND] * most)
    assert spent_guarantee(charges, replace(BUDGET, other_releases=(MEASURED,))) == expected


def test_unplanned_evaluations_are_charged():
    again = [charge(number, None, replace(MEASURED, steps=1), purpose=MEASURE) for number in range(5)]
    spent = spent_guarantee(again, replace(BUDGET, other_releases=(MEASURED,)))
    assert spent == guarantee(replace(MEASURED, steps=5))


def test_two_mechanisms_compose():
    other = replace(ROUND, noise_multiplier=3.0)
    charges = [charge(1, ("a",)), charge(2, ("b",), other), charge(3, ("a",), other)]
    assert spent_guarantee(charges, BUDGET) == guarantee(ROUND, other)


def test_no_charge_costs_nothing():
    assert spent_guarantee([], BUDGET).value == 0
    assert spent_guarantee([charge(asked=())], BUDGET).value == 0


def test_anchor_holds_as_ledger_grows(ledger):
    ledger.check(None)
    start = ledger.anchor()
    ledger.reserve(charge(), BUDGET)
    anchor = ledger.anchor()
    ledger.reserve(charge(2), BUDGET)
    for anchor_ in (None, start, anchor, ledger.anchor()):
        ledger.check(anchor_)


def damage(lines, kind):
    match kind:
        case "missing":
            return []
        case "shortened":
            return lines[:1]
        case "edited":
            return [lines[0].replace(b'"clip":0.5', b'"clip":0.1'), *lines[1:]]
        case "swapped":
            return lines[::-1]
        case "rubbish":
            return [lines[0], b"rubbish\n"]
        case "last edited":
            return [lines[0], lines[1].replace(b'"clip":0.5', b'"clip":0.1')]


@pytest.mark.parametrize("kind", ["missing", "shortened", "edited", "swapped", "rubbish", "last edited"])
def test_changed_ledger_is_refused(ledger, tmp_path, kind):
    for number in (1, 2):
        ledger.reserve(charge(number), BUDGET)
    anchor = ledger.anchor()
    file = tmp_path / JOURNAL
    file.write_bytes(b"".join(damage(file.read_bytes().splitlines(keepends=True), kind)))
    with pytest.raises(AntherError, match=r"ledger\.jsonl.*restore") as caught:
        ledger.check(anchor)
    assert "\n" not in str(caught.value)


def test_ledger_of_other_run_is_refused(tmp_path):
    one, two = ServerLedger(FileStorage(tmp_path / "one")), ServerLedger(FileStorage(tmp_path / "two"))
    one.reserve(charge(), BUDGET)
    two.reserve(charge(asked=("c",)), BUDGET)
    with pytest.raises(AntherError, match="is not the one that the checkpoint names"):
        two.check(one.anchor())


def test_torn_last_line_is_ignored(ledger, tmp_path):
    ledger.reserve(charge(1), BUDGET)
    anchor, whole = ledger.anchor(), (tmp_path / JOURNAL).read_bytes()
    ledger.reserve(charge(2), BUDGET)
    longer = (tmp_path / JOURNAL).read_bytes()
    for length in range(len(whole), len(longer)):
        (tmp_path / JOURNAL).write_bytes(longer[:length])
        ledger.check(anchor)
        assert ledger.charges() == [charge(1)]


def test_unknown_event_is_refused(ledger, tmp_path):
    from privacy.ledger import hash_chain

    for event in ({"state": "refunded"}, {"state": "reserved", "run": "run"}):
        (tmp_path / JOURNAL).write_bytes(hash_chain.encode_event(event, hash_chain.START) + b"\n")
        with pytest.raises(AntherError, match=r"ledger\.jsonl:1: not an event"):
            ledger.charges()
