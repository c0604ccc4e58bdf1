"""The server's ledger: charged before anybody is asked, never refunded, and missed when it is gone."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
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


def promised(*events):
    return with_strict(epsilon(events, BUDGET.delta, DEVICE), events)


def of(count, mechanism=ROUND):
    return promised(replace(mechanism, steps=count))


@pytest.fixture
def ledger(tmp_path):
    return ServerLedger(FileStorage(tmp_path))


def test_what_is_written_is_what_is_charged(ledger, tmp_path):
    assert ledger.reserve(charge(), BUDGET) == of(1)
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


def test_a_secret_sample_names_nobody(ledger, tmp_path):
    ledger.reserve(charge(asked=None, mechanism=SECRET), replace(BUDGET, participations=None))
    assert json.loads((tmp_path / JOURNAL).read_text())["asked"] is None
    assert ledger.participations() == {}


def test_beside_a_secret_sample_stands_what_it_comes_to_for_who_sees_it(ledger):
    """Of a device that was asked in every round: without the sample, and with what is measured."""
    budget = replace(BUDGET, participations=None, beside=(MEASURED,))
    for number in range(3):
        found = ledger.reserve(charge(number, None, SECRET), budget)
    assert found.value == promised(replace(SECRET, steps=3), MEASURED).value
    assert found.seen == epsilon([replace(SECRET, sampling_rate=1.0, steps=3), MEASURED], budget.delta).value
    assert found.seen > found.value
    assert str(found).endswith(f"; ε={found.seen:.3g} if the network sees who was asked)")
    assert ledger.reserve(charge(9, ("a",)), BUDGET).seen is not None  # what was sampled before stays so
    assert spent_guarantee([charge()], BUDGET).seen is None


def test_the_same_round_again_is_one_more(ledger):
    ledger.reserve(charge(), BUDGET)
    assert ledger.reserve(charge(), BUDGET) == of(2)
    ledger.release("run", 1)
    assert ledger.reserve(charge(), BUDGET) == of(3)
    assert ledger.participations() == {"a": 3, "b": 3}


def test_a_device_pays_for_the_rounds_that_it_was_asked_in(ledger):
    ledger.reserve(charge(1, ("a",)), BUDGET)
    ledger.reserve(charge(2, ("b",)), BUDGET)
    assert ledger.reserve(charge(3, ("b", "c")), BUDGET) == of(2)


def test_a_round_over_the_budget_is_not_written(ledger, tmp_path):
    budget = replace(BUDGET, epsilon=of(2).value)
    for number in (1, 2):
        ledger.reserve(charge(number), budget)
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(BudgetExhausted, match=r"round 3 would bring a device to ε=.* per device .* may spend ε="):
        ledger.reserve(charge(3), budget)
    assert (tmp_path / JOURNAL).read_bytes() == before
    assert ledger.reserve(charge(3, ("c",)), budget) == of(2)  # who wasn't asked yet has all of it left


def test_a_release_is_noted_once_and_changes_nothing(ledger, tmp_path):
    ledger.release("run", 1)  # nothing is reserved
    ledger.reserve(charge(), BUDGET)
    for _ in range(2):
        ledger.release("run", 1)
    states = [json.loads(line)["state"] for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert states == ["reserved", "released"]
    assert ledger.charges() == [charge()]


HISTORIES = st.lists(st.sets(st.sampled_from("abcd")), max_size=6)


@settings(max_examples=30, deadline=None)
@given(HISTORIES, st.integers(0, 3))
def test_spending_is_that_of_the_worst_device_by_a_loop(asked, measured):
    charges = [charge(number, tuple(sorted(names))) for number, names in enumerate(asked)]
    charges += [charge(number, None, replace(MEASURED, steps=1), purpose=MEASURE) for number in range(measured)]
    most = max((sum(name in names for names in asked) for name in "abcd"), default=0)
    expected = promised(MEASURED, *[ROUND] * most)
    assert spent_guarantee(charges, replace(BUDGET, beside=(MEASURED,))) == expected


def test_measuring_more_than_planned_is_paid_for():
    again = [charge(number, None, replace(MEASURED, steps=1), purpose=MEASURE) for number in range(5)]
    found = spent_guarantee(again, replace(BUDGET, beside=(MEASURED,)))
    assert found == promised(replace(MEASURED, steps=5))


def test_two_mechanisms_compose_over_the_device_that_had_both():
    other = replace(ROUND, noise_multiplier=3.0)
    charges = [charge(1, ("a",)), charge(2, ("b",), other), charge(3, ("a",), other)]
    assert spent_guarantee(charges, BUDGET) == promised(ROUND, other)


def test_nothing_asked_costs_nothing():
    assert spent_guarantee([], BUDGET).value == 0
    assert spent_guarantee([charge(asked=())], BUDGET).value == 0


def test_an_anchor_holds_as_the_ledger_grows(ledger):
    ledger.check(None)
    start = ledger.anchor()
    ledger.reserve(charge(), BUDGET)
    anchor = ledger.anchor()
    ledger.reserve(charge(2), BUDGET)
    for kept in (None, start, anchor, ledger.anchor()):
        ledger.check(kept)


def damaged(lines, how):
    match how:
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


@pytest.mark.parametrize("how", ["missing", "shortened", "edited", "swapped", "rubbish", "last edited"])
def test_a_ledger_that_is_not_as_it_was_is_refused(ledger, tmp_path, how):
    for number in (1, 2):
        ledger.reserve(charge(number), BUDGET)
    anchor = ledger.anchor()
    file = tmp_path / JOURNAL
    file.write_bytes(b"".join(damaged(file.read_bytes().splitlines(keepends=True), how)))
    with pytest.raises(AntherError, match=r"ledger\.jsonl.*restore") as caught:
        ledger.check(anchor)
    assert "\n" not in str(caught.value)


def test_another_runs_ledger_is_told_apart(tmp_path):
    one, two = ServerLedger(FileStorage(tmp_path / "one")), ServerLedger(FileStorage(tmp_path / "two"))
    one.reserve(charge(), BUDGET)
    two.reserve(charge(asked=("c",)), BUDGET)
    with pytest.raises(AntherError, match="is not the one that the checkpoint names"):
        two.check(one.anchor())


def test_a_torn_last_line_was_never_relied_on(ledger, tmp_path):
    ledger.reserve(charge(1), BUDGET)
    anchor, whole = ledger.anchor(), (tmp_path / JOURNAL).read_bytes()
    ledger.reserve(charge(2), BUDGET)
    longer = (tmp_path / JOURNAL).read_bytes()
    for length in range(len(whole), len(longer)):
        (tmp_path / JOURNAL).write_bytes(longer[:length])
        ledger.check(anchor)
        assert ledger.charges() == [charge(1)]


def test_an_event_of_another_kind(ledger, tmp_path):
    from privacy.ledger import hash_chain

    for event in ({"state": "refunded"}, {"state": "reserved", "run": "run"}):
        (tmp_path / JOURNAL).write_bytes(hash_chain.encode_event(event, hash_chain.START) + b"\n")
        with pytest.raises(AntherError, match=r"ledger\.jsonl:1: not an event"):
            ledger.charges()
