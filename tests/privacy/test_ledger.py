"""The ledger: nothing is refunded, forgotten or released twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import AntherError
from privacy.accounting import Mechanism, NonPrivate, PoissonGaussian
from privacy.ledger import RESERVED, SEALED, SENT, Entry, Ledger, Reservation
from privacy.policy import Policy, Refusal

GAUSSIAN = PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.2, steps=25)
FIRST = Reservation(
    run="run/../Ω", round=1, base="b" * 64, plan="p1", mechanism=GAUSSIAN, clip=0.01, release=True
)  # a run may be called anything: the server chooses its name
KEY = FIRST.key


def free(_past: Sequence[Mechanism], _new: Mechanism) -> None:
    """A policy without limits."""


def test_a_round_from_reservation_to_delivery(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "device")
    assert ledger.sealed(FIRST) is None
    ledger.reserve(FIRST, free)
    assert ledger.entries() == (Entry(FIRST, RESERVED),)
    assert ledger.sealed(FIRST) is None
    assert ledger.seal(KEY, b"reply") == b"reply"
    assert Ledger(tmp_path / "device").sealed(FIRST) == b"reply"
    assert [entry.state for entry in ledger.entries()] == [SEALED]
    ledger.sent(KEY)
    assert [entry.state for entry in ledger.entries()] == [SENT]
    assert not list((tmp_path / "device/outbox").iterdir())
    with pytest.raises(Refusal, match="can't be sent again"):
        ledger.sealed(FIRST)
    assert len((tmp_path / "device/ledger.jsonl").read_text().splitlines()) == 3


def test_everything_stays_in_its_own_folder(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "device")
    ledger.reserve(FIRST, free)
    ledger.seal(KEY, b"reply")
    assert {path.name for path in tmp_path.iterdir()} == {"device"}
    assert (tmp_path / "device").stat().st_mode & 0o077 == 0


def test_a_second_seal_sends_the_first_reply(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(FIRST, free)
    ledger.seal(KEY, b"first")
    assert Ledger(tmp_path).seal(KEY, b"second") == b"first"
    assert ledger.sealed(FIRST) == b"first"


def test_a_reserved_round_is_charged_once_and_for_ever(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(FIRST, free)
    once = ledger.spent(1e-3)
    ledger.reserve(FIRST, free)  # the same round again, after a crash
    assert ledger.spent(1e-3) == once
    ledger.reserve(replace(FIRST, round=2), free)
    assert once.value < ledger.spent(1e-3).value == pytest.approx(2.355, abs=0.02)  # 50 steps: field anchor
    ledger.reserve(replace(FIRST, round=3, mechanism=NonPrivate(), clip=None), free)
    assert ledger.spent(1e-3).value == float("inf")


def test_simulated_noise_is_charged_all_the_same(tmp_path: Path) -> None:
    real, test = Ledger(tmp_path / "real"), Ledger(tmp_path / "test")
    real.reserve(FIRST, free)
    test.reserve(replace(FIRST, release=False), free)
    assert test.spent(1e-3) == real.spent(1e-3)
    assert json.loads((tmp_path / "test/ledger.jsonl").read_text())["release"] is False


@pytest.mark.parametrize("seal", [False, True])
def test_another_plan_for_the_same_round_is_refused(tmp_path: Path, seal: bool) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(FIRST, free)
    if seal:
        ledger.seal(KEY, b"reply")
    other = replace(FIRST, plan="p2")
    for attempt in (lambda: ledger.reserve(other, free), lambda: ledger.sealed(other)):
        with pytest.raises(Refusal, match="another plan"):
            attempt()
    assert len(ledger.entries()) == 1


def test_a_refused_round_is_not_charged(tmp_path: Path) -> None:
    ledger, policy = Ledger(tmp_path), Policy(max_epsilon=2.0, delta=1e-3)
    ledger.reserve(FIRST, policy.check_spending)  # ε = 1.6
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(Refusal, match=r"ε=2\.3\d per image .* allows 2"):
        ledger.reserve(replace(FIRST, round=2), policy.check_spending)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    ledger, file = Ledger(tmp_path), tmp_path / "ledger.jsonl"
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
def test_a_garbled_line_is_an_error_and_changes_nothing(tmp_path: Path, garbage: bytes) -> None:
    ledger, file = Ledger(tmp_path), tmp_path / "ledger.jsonl"
    ledger.reserve(FIRST, free)
    damaged = file.read_bytes() + garbage + b"\n" + file.read_bytes().replace(b'"round": 1', b'"round": 2')
    file.write_bytes(damaged)
    for attempt in (ledger.entries, lambda: ledger.reserve(replace(FIRST, round=3), free), lambda: ledger.spent(1e-3)):
        with pytest.raises(AntherError, match=r"ledger.jsonl:2: not an event") as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert file.read_bytes() == damaged


def test_a_repeated_reservation_is_garbled(tmp_path: Path) -> None:
    ledger, file = Ledger(tmp_path), tmp_path / "ledger.jsonl"
    ledger.reserve(FIRST, free)
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(AntherError, match="out of turn"):
        ledger.entries()


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"Reply")])
def test_a_damaged_sealed_reply_is_never_replaced(tmp_path: Path, damage) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(FIRST, free)
    ledger.seal(KEY, b"reply")
    damage(next((tmp_path / "outbox").iterdir()))
    for attempt in (lambda: ledger.sealed(FIRST), lambda: ledger.seal(KEY, b"another")):
        with pytest.raises(AntherError, match="second release"):
            attempt()


def test_two_at_once_can_not_both_take_the_last_of_a_budget(tmp_path: Path) -> None:
    policy, refused = Policy(max_epsilon=2.0, delta=1e-3), []

    def reserve(number: int) -> None:
        try:
            Ledger(tmp_path).reserve(replace(FIRST, round=number), policy.check_spending)
        except Refusal as refusal:
            refused.append(refusal)

    threads = [threading.Thread(target=reserve, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(tmp_path).entries()) == 1
    assert len(refused) == 5
