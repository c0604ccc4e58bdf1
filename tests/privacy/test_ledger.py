"""The ledger: nothing is refunded, forgotten or released twice, in files and in a fleet's database alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import privacy.ledger
from conf.errors import AntherError
from privacy.accounting import Mechanism, NonPrivate, PoissonGaussian
from privacy.ledger import RESERVED, SEALED, SENT, Entry, Ledger, Reservation, _Replayed
from privacy.policy import Policy, Refusal
from tests.privacy.storages import FORMS, Kept, KeptFiles

GAUSSIAN = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
FIRST = Reservation(
    run="run/../Ω", round=1, base="b" * 64, plan="p1", mechanism=GAUSSIAN, clip=0.01, release=True
)  # a run may be called anything: the server chooses its name
KEY = FIRST.key


def free(_past: Sequence[Mechanism], _new: Mechanism) -> None:
    """A policy without limits."""


@pytest.fixture(params=FORMS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    found: Kept = request.param(tmp_path)
    return found


def test_a_round_from_reservation_to_delivery(kept: Kept) -> None:
    ledger = Ledger(kept.storage())
    assert ledger.sealed(FIRST) is None
    ledger.reserve(FIRST, free)
    assert ledger.entries() == (Entry(FIRST, RESERVED),)
    assert ledger.sealed(FIRST) is None
    assert ledger.seal(KEY, b"reply") == b"reply"
    assert Ledger(kept.storage()).sealed(FIRST) == b"reply"
    assert [entry.state for entry in ledger.entries()] == [SEALED]
    ledger.sent(KEY)
    assert [entry.state for entry in ledger.entries()] == [SENT]
    assert not kept.blobs()
    with pytest.raises(Refusal, match="can't be sent again"):
        ledger.sealed(FIRST)
    assert len(kept.lines()) == 3


def test_both_forms_keep_the_same_lines(tmp_path: Path) -> None:
    found = []
    for form in FORMS:
        kept = form(tmp_path)
        ledger = Ledger(kept.storage())
        ledger.reserve(FIRST, free)
        ledger.seal(KEY, b"reply")
        found.append((kept.lines(), kept.blobs()))
    assert found[0] == found[1]


def test_everything_stays_in_its_own_folder(tmp_path: Path) -> None:
    ledger = Ledger(KeptFiles(tmp_path).storage())
    ledger.reserve(FIRST, free)
    ledger.seal(KEY, b"reply")
    assert {path.name for path in tmp_path.iterdir()} == {"device"}
    assert (tmp_path / "device").stat().st_mode & 0o077 == 0


def test_a_second_seal_sends_the_first_reply(kept: Kept) -> None:
    ledger = Ledger(kept.storage())
    ledger.reserve(FIRST, free)
    ledger.seal(KEY, b"first")
    assert Ledger(kept.storage()).seal(KEY, b"second") == b"first"
    assert ledger.sealed(FIRST) == b"first"


def test_a_reserved_round_is_charged_once_and_for_ever(kept: Kept) -> None:
    ledger = Ledger(kept.storage())
    ledger.reserve(FIRST, free)
    once = ledger.spent(1e-3)
    ledger.reserve(FIRST, free)  # the same round again, after a crash
    assert ledger.spent(1e-3) == once
    ledger.reserve(replace(FIRST, round=2), free)
    assert once.value < ledger.spent(1e-3).value == pytest.approx(2.355, abs=0.02)  # 50 steps: field anchor
    ledger.reserve(replace(FIRST, round=3, mechanism=NonPrivate(), clip=None), free)
    assert ledger.spent(1e-3).value == float("inf")


def test_what_others_wrote_is_seen_at_the_next_look(kept: Kept) -> None:
    """What was read before may be kept, but never believed over what is there."""
    ledger = Ledger(kept.storage())
    for number in range(1, 6):
        assert len(ledger.entries()) == len(Ledger(kept.storage()).entries()) == number - 1
        (ledger if number % 2 else Ledger(kept.storage())).reserve(replace(FIRST, round=number), free)
    whole = kept.lines()
    kept.put_lines(whole[:2])
    assert [entry.reservation.round for entry in ledger.entries()] == [1, 2]
    kept.put_lines([*whole[:2], whole[3]])
    assert [entry.reservation.round for entry in ledger.entries()] == [1, 2, 4]
    kept.put_lines([whole[1], whole[0]])
    assert [entry.reservation.round for entry in ledger.entries()] == [2, 1]


def test_more_ledgers_than_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.ledger._replayed", _Replayed(most=2))
    ledgers = [Ledger(KeptFiles(tmp_path / str(number)).storage()) for number in range(4)]
    for number in (1, 2, 3):
        for ledger in ledgers:
            ledger.reserve(replace(FIRST, round=number), free)
            ledger.seal(("run/../Ω", number, "train"), b"reply")
            assert [entry.state for entry in ledger.entries()] == [SEALED] * number
    assert len(privacy.ledger._replayed._kept) == 2


def test_simulated_noise_is_charged_all_the_same(tmp_path: Path) -> None:
    real, test = KeptFiles(tmp_path / "real"), KeptFiles(tmp_path / "test")
    Ledger(real.storage()).reserve(FIRST, free)
    Ledger(test.storage()).reserve(replace(FIRST, release=False), free)
    assert Ledger(test.storage()).spent(1e-3) == Ledger(real.storage()).spent(1e-3)
    assert json.loads(test.lines()[0])["release"] is False


@pytest.mark.parametrize("seal", [False, True])
def test_another_plan_for_the_same_round_is_refused(kept: Kept, seal: bool) -> None:
    ledger = Ledger(kept.storage())
    ledger.reserve(FIRST, free)
    if seal:
        ledger.seal(KEY, b"reply")
    other = replace(FIRST, plan="p2")
    for attempt in (lambda: ledger.reserve(other, free), lambda: ledger.sealed(other)):
        with pytest.raises(Refusal, match="another plan"):
            attempt()
    assert len(ledger.entries()) == 1


def test_a_refused_round_is_not_charged(kept: Kept) -> None:
    ledger, policy = Ledger(kept.storage()), Policy(max_epsilon=2.0, delta=1e-3)
    ledger.reserve(FIRST, policy.check_spending)  # ε = 1.6
    before = kept.lines()
    with pytest.raises(Refusal, match=r"ε=2\.3\d per image .* allows 2"):
        ledger.reserve(replace(FIRST, round=2), policy.check_spending)
    assert kept.lines() == before


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    ledger, file = Ledger(KeptFiles(tmp_path).storage()), tmp_path / "device/ledger.jsonl"
    ledger.reserve(FIRST, free)
    whole = file.read_bytes()
    ledger.reserve(replace(FIRST, round=2), free)
    both = file.read_bytes()
    for length in range(len(whole), len(both)):
        file.write_bytes(both[:length])
        assert [entry.reservation for entry in ledger.entries()] == [FIRST]
        assert file.read_bytes() == whole
    file.write_bytes(whole + b"\0" * 512)  # what some file systems leave after a power cut
    ledger.reserve(replace(FIRST, round=2), free)
    assert file.read_bytes() == both


@pytest.mark.parametrize("garbage", [
    b"{}", b"\xff\xfe", b"[1]", b"null", b"", b'{"state": "sealed", "run": "x", "round": 9, "sha256": ""}',
    b'{"state": "reserved", "run": "x", "round": 9}', b'{"state": "paid", "run": "x", "round": 9}',
])  # fmt: skip
def test_a_garbled_line_is_an_error_and_changes_nothing(kept: Kept, garbage: bytes) -> None:
    ledger = Ledger(kept.storage())
    ledger.reserve(FIRST, free)
    (line,) = kept.lines()
    damaged = [line, garbage, line.replace(b'"round": 1', b'"round": 2')]
    kept.put_lines(damaged)
    for attempt in (ledger.entries, lambda: ledger.reserve(replace(FIRST, round=3), free), lambda: ledger.spent(1e-3)):
        with pytest.raises(AntherError, match=r"ledger.jsonl:2: not an event") as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert kept.lines() == damaged


def test_a_repeated_reservation_is_garbled(kept: Kept) -> None:
    ledger = Ledger(kept.storage())
    ledger.reserve(FIRST, free)
    kept.put_lines(kept.lines() * 2)
    with pytest.raises(AntherError, match="out of turn"):
        ledger.entries()


@pytest.mark.parametrize("damage", [None, b"Reply"])
def test_a_damaged_sealed_reply_is_never_replaced(kept: Kept, damage: bytes | None) -> None:
    ledger = Ledger(kept.storage())
    ledger.reserve(FIRST, free)
    ledger.seal(KEY, b"reply")
    (name,) = kept.blobs()
    kept.put_blob(name, damage)
    for attempt in (lambda: ledger.sealed(FIRST), lambda: ledger.seal(KEY, b"another")):
        with pytest.raises(AntherError, match="second release"):
            attempt()


@pytest.mark.parametrize("shared", [False, True])
def test_two_at_once_can_not_both_take_the_last_of_a_budget(kept: Kept, shared: bool) -> None:
    policy, refused, storage = Policy(max_epsilon=2.0, delta=1e-3), [], kept.storage()
    Ledger(storage).entries()

    def reserve(number: int) -> None:
        try:
            ledger = Ledger(storage if shared else kept.storage())
            ledger.reserve(replace(FIRST, round=number), policy.check_spending)
        except Refusal as refusal:
            refused.append(refusal)

    threads = [threading.Thread(target=reserve, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(kept.storage()).entries()) == 1
    assert len(refused) == 5
